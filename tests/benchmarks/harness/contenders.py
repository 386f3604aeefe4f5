"""Who takes part: the worker that runs each contender, its environment, and what sets it apart."""

from __future__ import annotations

from typing import Any, NamedTuple


class Contender(NamedTuple):
    """A library as one worker runs it."""

    worker: str  # script in workers/, by what it does for a case
    environment: str  # see `environments`
    options: dict[str, Any] = {}  # noqa: RUF012  handed to the worker
    tree: str = ""  # another checkout of jaxalign, whose package and workers are run in place of this one's


CONTENDERS: dict[str, Contender] = {
    "jaxalign": Contender("jaxalign_train", ".venv"),
    # The whole model trained, beside those that train an adapter.
    "jaxalign-full": Contender("jaxalign_train", ".venv", {"full": True}),
    "trl": Contender("trl_train", ".venv-oracle"),
    # Best-fit packing: records keep apart. The trainer lays a batch's rows end to end and masks by record.
    "trl-packed": Contender("trl_train", ".venv-oracle", {"packing": "bfd"}),
    # Records cut anywhere into full rows, in which they see each other: faster, and not the same training.
    "trl-wrapped": Contender("trl_train", ".venv-oracle", {"packing": "wrapped"}),
    "trl-1.12": Contender("trl_ppo", ".venv-oracle-ppo"),
    # TRL 1.16 has no loss that holds all logits at once; 1.12 has, beside its chunked one.
    "trl-1.12-unchunked": Contender("trl_train", ".venv-oracle-ppo", {"loss_type": "nll"}),
    "tunix": Contender("tunix_train", ".venv-tunix"),
    "transformers-static": Contender("transformers_generate", ".venv-oracle", {"cache": "static"}),
    "transformers-dynamic": Contender("transformers_generate", ".venv-oracle", {"cache": "dynamic"}),
}
CEILING = Contender("ceiling", ".venv")
BEFORE = "jaxalign-before"  # with --before: an earlier checkout, in the same turns


def contender(name: str, task: str) -> Contender:
    """The contender of that name, for a task."""
    found = CONTENDERS[name]
    return found._replace(worker="jaxalign_generate") if (is_ours(name), task) == (True, "generate") else found


def is_ours(name: str) -> bool:
    """Whether a contender is jaxalign, of this checkout or an earlier one."""
    return name in ("jaxalign", "jaxalign-full", BEFORE)

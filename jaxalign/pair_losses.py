"""The losses on pairs as configuration knows them: the fields that each reads, its range of beta, its reference.

No jax here: `ops/losses_preference.py` has the functions, by the same names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxalign.errors import InputError

_BIG = 1e6  # coefficients


class PairLoss(NamedTuple):
    """One of them."""

    fields: tuple[str, ...] = ()  # of `algorithm`, that it reads beside beta
    beta: tuple[float, float] = (0.05, 0.5)  # what guides and its paper give
    reference: bool | None = None  # whether it needs one; None: without one, log-ratios are the policy's log-probs
    beside: str | None = None  # another, with which its paper has it


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(("label_smoothing",)),
    "ipo": PairLoss(("average",), beta=(0.01, 0.5)),
    "hinge": PairLoss(),
    "robust": PairLoss(("label_smoothing",)),
    "exo_pair": PairLoss(("label_smoothing",)),
    "discopop": PairLoss(("discopop_tau",)),
    "sigmoid_norm": PairLoss(beta=(2, 10)),  # of log-ratios of one token, not of sums over some hundred
    "dpop": PairLoss(("dpop_lambda",), reference=True),
    "rdpo": PairLoss(("rdpo_alpha",)),
    "nca_pair": PairLoss(beta=(0.01, 0.5), reference=True),
    "sppo_hard": PairLoss(beta=(0.001, 0.5), reference=True),
    "apo_zero": PairLoss(reference=True),
    "apo_down": PairLoss(reference=True),
    "simpo": PairLoss(("simpo_gamma",), beta=(2, 10), reference=False),
    "orpo": PairLoss(beta=(0.05, 1), reference=False, beside="sft"),
    "sft": PairLoss(reference=False),
}
_UNSET = {
    "label_smoothing": 0.0,
    "average": None,
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "dpop_lambda": 50.0,
    "rdpo_alpha": 0.01,
}


def loss_options(algorithm: Any) -> dict[str, Any]:
    """What losses on pairs are given beside beta; a field that is None is left to the loss's own default.

    Args:
      algorithm: that section of a configuration.
    """
    fields = [field for name in _losses(algorithm) for field in PAIR_LOSSES.get(name, PairLoss()).fields]
    return {field: algorithm[field] for field in fields if algorithm[field] is not None}


def _losses(algorithm: Any) -> list[str]:
    """The names of the loss and of further ones."""
    return [algorithm.loss, *(name for name, _ in algorithm.extra_losses)]


def check(config: Any, inputs: bool) -> None:
    """Refuses fields that no loss reads, a loss without what it needs, and what is no loss.

    Args:
      config: one stage's configuration.
      inputs: not read.
    """
    cfg = config.algorithm
    _check_extra_losses(cfg)
    names = _losses(cfg)
    shown, known = " and ".join(names), all(name in PAIR_LOSSES for name in names)
    for field, unset in _UNSET.items():
        readers = [name for name, one in PAIR_LOSSES.items() if field in one.fields]
        if known and cfg[field] != unset and not set(names) & set(readers):
            raise InputError(
                f"algorithm.{field}={cfg[field]} with the {shown} loss",
                f"{unset}: {', '.join(readers)} alone read{'s' * (len(readers) == 1)} it",
                f"--config.algorithm.{field}={unset}",
            )
    if "exo_pair" in names and not cfg.label_smoothing:
        raise InputError(
            "algorithm.label_smoothing=0 with the exo_pair loss",
            "a share above 0: labels without any doubt are infinitely far from every policy",
            "--config.algorithm.label_smoothing=0.001",
        )
    if cfg.reference == "none":
        if needing := [name for name in names if name in PAIR_LOSSES and PAIR_LOSSES[name].reference]:
            raise InputError(
                f"algorithm.reference=none with the {needing[0]} loss",
                "live or cached: this loss holds each completion against the reference",
                "--config.algorithm.reference=live",
            )
        if cfg.reference_path:
            raise InputError(
                f"algorithm.reference=none and algorithm.reference_path={cfg.reference_path}",
                "one of them",
                "--config.algorithm.reference_path=None",
            )
    elif known and all(PAIR_LOSSES[name].reference is False for name in names):
        raise InputError(
            f"algorithm.reference={cfg.reference} with the {shown} loss",
            "none: it has no use for a reference, which costs memory and a forward pass",
            "--config.algorithm.reference=none",
        )


def _check_extra_losses(cfg: Any) -> None:
    """Pairs of a name and a weight."""
    usual = "--config.algorithm.extra_losses='((\"sft\", 0.1),)'"
    for item in cfg.extra_losses:
        found = f"algorithm.extra_losses holds {item!r}"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(found, "pairs of a loss and its weight", usual)
        name, weight = item
        if name not in PAIR_LOSSES:
            raise InputError(found, f"losses among {', '.join(PAIR_LOSSES)}", usual)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= _BIG:
            raise InputError(found, f"a weight above 0, at most {_BIG:g}", usual)
        if _losses(cfg).count(name) > 1:
            raise InputError(f"the {name} loss twice", "each loss once, with its whole weight", usual)


def warnings(config: Any) -> list[str]:
    """What is allowed, and hardly meant.

    Args:
      config: one stage's configuration.
    """
    names = _losses(config.algorithm)
    return [
        f"algorithm.loss {name} is meant beside {other}: --config.algorithm.extra_losses='((\"{other}\", 1.0),)'"
        for name in names
        if name in PAIR_LOSSES and (other := PAIR_LOSSES[name].beside) and other not in names
    ]

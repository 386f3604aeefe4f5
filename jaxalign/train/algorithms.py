"""How algorithms train: which models each trains, which it keeps frozen, its objective, how it prepares a batch."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.errors import InputError, named
from jaxalign.functions import is_name
from jaxalign.models.stacks import place
from jaxalign.ops.trees import by_path
from jaxalign.pair_losses import loss_options
from jaxalign.rollout.pairs import completions_per_row
from jaxalign.steps.objective import Objective
from jaxalign.steps.policy import policy_objective, stop_on_kl
from jaxalign.steps.preference import preference_objective
from jaxalign.steps.reward import reward_objective
from jaxalign.steps.sft import sft_objective
from jaxalign.train.models import Role, Roles, revision_of
from jaxalign.train.named_functions import own_estimator, own_loss
from jaxalign.train.prepare import Prepare, Prepared
from jaxalign.types import (
    Batch,
    CausalByIndex,
    CausalByPosition,
    Completions,
    PolicyBatch,
    Readouts,
    Rows,
)


class Program(NamedTuple):
    """One algorithm on its models."""

    trained: dict[str, Role]
    frozen: dict[str, Role]
    objective: Objective
    exported: str  # the trained role whose model is the run's result
    extra: dict[str, Any] = {}  # noqa: RUF012  initial `TrainState.extra`
    updates: int = 1  # optimizer updates for each batch of the data stream
    early_stop: Callable | None = None
    prepare: Prepare = lambda state, frozen, batch: Prepared(state, [batch])
    # from the shapes of a batch of the data stream to those that a step is given, where `prepare` makes other ones
    stepped: Callable[[Any], Any] = lambda batch: batch
    reference: Role | None = None  # whose log-probs are computed ahead and attached to each batch
    # (state, frozen, a batch on the mesh, from a record's number to the record of the set that the batch is from) ->
    # {name: (sum, weight)}; None: the objective's own metrics
    evaluate: Callable[..., dict[str, Any]] | None = None
    eval_metrics: Callable[[], list[str]] | None = None  # names of what `evaluate` measures
    forward: float = 1.0  # forward passes of one token
    backward: float = 2.0  # the worth of its backward pass in them

    @property
    def passes(self) -> float:
        """Forward passes' worth of work of one token, for MFU."""
        return self.forward + self.backward


class Context(NamedTuple):
    """What algorithms may need beside models: PPO to collect experience, others to check the data."""

    mesh: Mesh
    tokenizer: Any
    stop_ids: tuple[int, ...]
    dataset: Any  # training data: its records are what rewards are told of its prompts
    eval_dataset: Any = None


def build(config: Any, roles: Roles, context: Context) -> Program:
    """The program of `config.algorithm.name`.

    Args:
      config: one stage's configuration.
      roles: makes the models' parts, read onto the mesh.
      context: what else there is.
    """
    program = BUILDERS[config.algorithm.name](config, roles, context)
    rests = {name: role.rest for name, role in program.trained.items() if role.rest is not None}
    # First, so that they lie on the devices, whoever shares them.
    return program._replace(frozen=rests | program.frozen, backward=_backward(program))


def _backward(program: Program) -> float:
    """Forward passes' worth of the backward pass: 2, where all is trained.

    Half of it makes gradients of kernels, of those that are trained. The other half goes on to the layers below, as far
    down as something is trained.
    """
    work = total = 0.0
    for role in program.trained.values():
        learned, whole = by_path(role.abstract()), by_path(role.model.plain().abstract())
        layers = {path: leaf for path, leaf in whole.items() if path.startswith("layers/")}
        below = _lowest(learned, role.model.config.num_layers) / role.model.config.num_layers
        total += _kernels(whole)
        work += _kernels(learned) + _kernels(whole) - below * _kernels(layers)
    return work / total


def _lowest(learned: Mapping[str, Any], num_layers: int) -> int:
    """The first layer that a backward pass comes to; their number: none."""
    if any(path.startswith("embed/") for path in learned):
        return 0
    return min((place(path).start for path in learned if path.startswith("layers/")), default=num_layers)


def _kernels(leaves: Mapping[str, Any]) -> int:
    """How many numbers are in kernels."""
    return sum(leaf.size for path, leaf in leaves.items() if path.endswith("kernel"))


def _sft(config, roles, context) -> Program:
    policy = roles.policy(config.optimizer.learning_rate)
    model = policy.model
    return Program({"policy": policy}, {}, sft_objective(model.apply, model.head), "policy")


def _reward(config, roles, context) -> Program:
    role = roles.scorer(config.model.path, config.optimizer.learning_rate)
    cfg = config.algorithm
    if cfg.use_margin:
        found = check_margins(context.dataset, "data.sources")
        if config.data.eval_sources:  # of a held-out share it is chance
            found += check_margins(context.eval_dataset, "data.eval_sources")
        context.dataset.report["warnings"] += found
    objective = reward_objective(
        role.model.apply,
        role.model.score_kernel,
        label_smoothing=cfg.label_smoothing,
        center_coef=cfg.center_coef,
        use_margin=cfg.use_margin,
    )
    return Program({"reward": role}, {}, objective, "reward")


def _dpo(config, roles, context) -> Program:
    cfg = config.algorithm
    policy = roles.policy(config.optimizer.learning_rate)
    given = {
        "loss": own_loss(cfg.loss) if is_name(cfg.loss) else cfg.loss,
        "extra_losses": cfg.extra_losses,
        "beta": cfg.beta,
        "reference": cfg.reference,
        **{"label_smoothing": cfg.label_smoothing} | loss_options(cfg),
    }
    model = policy.model
    if cfg.reference == "none":
        return Program({"policy": policy}, {}, preference_objective(model.apply, model.head, **given), "policy")
    if cfg.reference_path:
        check_tokens(cfg.reference_path, context.tokenizer, revision_of(cfg.reference_path, config))
    reference = roles.reference(cfg.reference_path)
    if _shapes(policy) != _shapes(reference):
        raise InputError(
            f"the reference {cfg.reference_path} has other shapes than the policy {config.model.path}",
            "a reference of the policy's architecture",
            "--config.algorithm.reference_path=None (the policy's own start)",
        )
    live = cfg.reference == "live"
    if live:
        reference = _run_as(policy, reference)
    objective = preference_objective(
        model.apply, model.head, ref_apply=reference.model.apply, ref_head=reference.model.head, **given
    )
    return Program(
        {"policy": policy},
        {"ref": reference} if live else {},
        objective,
        "policy",
        reference=None if live else reference,
        forward=2.0 if live else 1.0,
    )


def _run_as(policy: Role, reference: Role) -> Role:
    """The reference, its layers one by one or in a loop as the policy's: equal values then give equal bits."""
    model = reference.model
    config = dataclasses.replace(model.config, remat=policy.model.config.remat)
    return reference._replace(model=dataclasses.replace(model, config=config))


def check_margins(dataset: Any, field: str) -> list[str]:
    """Refuses data of which no record states by how much its better side should win.

    Args:
      dataset: of pairs; a record without a stated margin has 0.
      field: that the data is from, for the message.

    Returns:
      A sentence about those of several sources that have no margins, if there are such.

    Raises:
      InputError: saying whether there is no margin column, or one that holds no numbers.
    """
    margins = dataset.lengths()["score"]
    if margins.any():
        paths = [source["path"] for source in dataset.report["records"]["sources"]]
        if len(paths) < 2:
            return []
        with_some, without = set(), set()
        for i in np.argsort(margins == 0, kind="stable"):  # records with a margin first: mostly they are enough
            (with_some if margins[i] else without).add(_source_of(dataset.record(int(i)).source, paths))
            if len(with_some) == len(set(paths)):
                break
        lacking = ", ".join(sorted(without - with_some))
        return [f"algorithm.use_margin, and no record of {lacking} has a margin: theirs count as 0"] * bool(lacking)
    record = dataset.record(0)
    found = f"its `margin` column holds {record.columns['margin']!r}" if "margin" in record.columns else "no `margin`"
    raise InputError(
        f"algorithm.use_margin, and no record of {field} has a margin: {found} ({record.source}:{record.line})",
        "a number other than 0 in some record, by which the better side should win",
        f'--config.{field}=\'[{{"path": "{record.source}", "columns": {{"score": "COLUMN"}}}}]\', or '
        "--config.algorithm.use_margin=False",
    )


def _source_of(file: str, paths: list[str]) -> str:
    """The source that a record's file belongs to: it is the file, a folder or a glob, or a hub id."""
    return next((path for path in paths if file.startswith(path) or fnmatch.fnmatch(file, path)), file)


_READERS = {
    "reference_path": ("reference", "the policy's own start"),
    "value_path": ("value model", "the reward model where its tokenizer is the policy's, else the policy's own start"),
}


def check_tokens(path: str, tokenizer: Any, revision: str | None = None, field: str = "reference_path") -> None:
    """Refuses a model that reads the policy's ids and to which they stand for other tokens, or for none.

    A reference's log-probs would be of other texts; a value model may have more tokens than the policy.

    Args:
      path: the model's directory or hub id.
      tokenizer: of the policy.
      revision: of the hub id.
      field: which gave the path: "reference_path" or "value_path".

    Raises:
      InputError: naming a token that differs.
    """
    from jaxalign.models.tokenizer import load_tokenizer

    role, usual = _READERS[field]
    with named(f"algorithm.{field}"):
        ours, theirs = tokenizer.get_vocab(), load_tokenizer(path, revision).get_vocab()
    read = ours.keys() | theirs.keys() if field == "reference_path" else ours.keys()
    differing = sorted(token for token in read if ours.get(token) != theirs.get(token))
    if differing:
        token = differing[0]
        raise InputError(
            f"{len(differing)} tokens of the {role} {path} are not the policy's: {token!r} is {theirs.get(token)} "
            f"there and {ours.get(token)} here",
            f"a {role} with the policy's tokenizer",
            f"--config.algorithm.{field}=None ({usual})",
        )


def _shapes(role: Role) -> Any:
    return jax.tree.map(lambda x: x.shape, role.model.plain().abstract())


def _ppo(config, roles, context) -> Program:
    from jaxalign.models.tokenizer import check_vocabulary
    from jaxalign.rewards.model import ModelScorer, same_tokenizer
    from jaxalign.train import experience

    cfg = config.algorithm
    policy = roles.policy(config.optimizer.learning_rate)
    reward, reward_role = _reward_of(config, roles, context)
    start = config.rewards.model
    if isinstance(reward, ModelScorer) and not same_tokenizer(reward.encoder.tokenizer, context.tokenizer):
        start = None  # it knows other tokens by these ids
    value_path = cfg.value_path or start or config.model.path
    value = roles.scorer(value_path, config.optimizer.value_learning_rate)
    fix = "a value model with the policy's tokenizer: --config.algorithm.value_path=DIR"
    check_vocabulary(context.tokenizer, value.model.config.vocab_size, value_path, fix)
    if value_path not in (start, config.model.path):
        check_tokens(value_path, context.tokenizer, field="value_path")
    reference = _run_as(policy, roles.reference())
    if cfg.one_base:
        named_roles = {"policy": policy, "ref": reference, "value": value} | (
            {"reward": reward_role} if reward_role else {}
        )
        _check_one_base(named_roles)
    prepare = experience.make_prepare(
        config,
        policy=policy.model,
        ref=reference.model,
        value=value.model,
        reward=reward,
        records=context.dataset.record,
        tokenizer=context.tokenizer,
        stop_ids=context.stop_ids,
        mesh=context.mesh,
        estimator=own_estimator(cfg.estimator, cfg) if is_name(cfg.estimator) else cfg.estimator,
    )
    objective = policy_objective(
        policy.model.apply,
        policy.model.head,
        value.model.apply,
        value.model.score_kernel,
        temperature=config.rollout.temperature,
        clip_range=cfg.clip_range,
        value_clip_range=cfg.value_clip_range,
        vf_coef=cfg.vf_coef,
        entropy_coef=cfg.entropy_coef,
    )
    return Program(
        {"policy": policy, "value": value},
        {"ref": reference} | ({"reward": reward_role} if reward_role else {}),
        objective,
        "policy",
        extra=experience.initial_extra(config),
        updates=cfg.num_ppo_epochs * cfg.num_minibatches,
        early_stop=None if cfg.max_approx_kl is None else stop_on_kl(cfg.max_approx_kl),
        prepare=prepare,
        stepped=functools.partial(_policy_batch, config, context.dataset),
        evaluate=prepare.evaluate,
        eval_metrics=experience.eval_metrics,
    )


def _check_one_base(roles: dict[str, Role]) -> None:
    """Refuses roles that would hold more than one frozen base."""
    bases: dict[Any, list[str]] = {}
    for name, role in roles.items():
        bases.setdefault(role.base, []).append(name)
    shown = "; ".join(f"{', '.join(names)}: {base[0] if base else 'random numbers'}" for base, names in bases.items())
    if len(bases) > 1:
        raise InputError(
            f"algorithm.one_base, and {len(roles)} roles start from {len(bases)} models ({shown})",
            "adapters of one model: stages that train them with one model.path",
            "--config.algorithm.one_base=False",
        )
    if roles["policy"].rest is None or roles["value"].rest is None:
        raise InputError(
            "algorithm.one_base, and the policy and the value model are trained whole",
            "adapters beside the frozen base",
            "--config.adapter.rank=16, or --config.algorithm.one_base=False",
        )


def _policy_batch(config: Any, dataset: Any, batch: Batch) -> PolicyBatch:
    """A minibatch of sampled completions behind prompts of the greatest width: what fits then fits always."""
    together = completions_per_row(config.rollout.num_samples)
    rows = config.batch_size * config.rollout.num_samples // config.algorithm.num_minibatches // together
    length = together * config.rollout.max_new_tokens  # of a row's completions

    def array(dtype, *dims):
        return jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=batch.rows.tokens.sharding)

    whole = Batch(
        Rows(*[array(np.int32, dataset.shape.length + length)] * 4)._replace(
            causal=CausalByIndex() if together == 1 else CausalByPosition()
        ),
        Readouts(array(np.int32, length), array(np.int32, length), array(np.int32, length), array(np.bool_, length)),
        Completions(*(array(x.dtype, together) for x in batch.completions)),
        array(np.int32, together),
    )
    return PolicyBatch(whole, *(array(np.float32, length) for _ in range(5)))


def _reward_of(config, roles, context) -> tuple[Any, Role | None]:
    """What scores completions, and the frozen role that it reads its parameters from."""
    from jaxalign.data.dialogues import render_plain
    from jaxalign.functions import load_function
    from jaxalign.models.tokenizer import check_vocabulary, load_tokenizer, stop_ids
    from jaxalign.rewards.function import FunctionScorer
    from jaxalign.rewards.model import ModelScorer, same_tokenizer

    if config.rewards.function:
        scorer = FunctionScorer(load_function(config.rewards.function), config.rewards.function)
        for dataset in (context.eval_dataset, context.dataset):
            if dataset is not None:
                scorer.expect(_columns(dataset, scorer.needs))
        return scorer, None
    path = config.rewards.model
    role, revision = roles.scorer(path), revision_of(path, config)
    with named("rewards.model"):
        tokenizer = load_tokenizer(path, revision)
    fix = "a reward model with a tokenizer of its own: --config.rewards.model=DIR"
    check_vocabulary(tokenizer, role.model.config.vocab_size, path, fix)
    ends = stop_ids(path, tokenizer, revision)
    # The policy's own rows will do where they end as the reward model's do.
    if same_tokenizer(tokenizer, context.tokenizer) and set(context.stop_ids) <= set(ends):
        return role.model, role
    return ModelScorer(role.model, tokenizer, mesh=context.mesh, stop_ids=ends, plain=render_plain), role


def _columns(dataset: Any, wanted: frozenset[str]) -> set[str]:
    """Columns of the records, as far as they must be read to find the wanted ones."""
    found: set[str] = set()
    for i in range(dataset.num_records):
        found |= dataset.record(i).columns.keys()
        if wanted <= found:
            break
    return found


BUILDERS: dict[str, Callable[[Any, Roles, Context], Program]] = {
    "sft": _sft,
    "reward": _reward,
    "dpo": _dpo,
    "ppo": _ppo,
}

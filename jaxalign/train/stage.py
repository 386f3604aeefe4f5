"""A training stage: its data, models and compiled steps."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.config import defaults
from jaxalign.errors import InputError, named
from jaxalign.models.export import only_here
from jaxalign.models.peft_export import check_form
from jaxalign.models.schedule import settled_remat
from jaxalign.models.token_rows import ENDS, leaf_of
from jaxalign.ops.trees import by_path
from jaxalign.parallel.host_memory import DEVICE, HOST, in_memory, require_host_memory
from jaxalign.parallel.mesh import batch_shards
from jaxalign.parallel.sharding import param_shardings, replicated, unsplit
from jaxalign.ranges import ADAPTER_RATE
from jaxalign.relations import template_kwargs
from jaxalign.steps.loss_scale import LossScale
from jaxalign.steps.step import make_eval_step, make_train_step
from jaxalign.train import algorithms
from jaxalign.train.checkpoints import abstract
from jaxalign.train.compiled import Compiled
from jaxalign.train.lock import Lock
from jaxalign.train.models import Role, Roles, adapter_base, describe_start, revision_of, shared
from jaxalign.train.optimizer import check_rate_factors, make_optimizer, make_schedule, updates_made
from jaxalign.train.rundir import RunDir
from jaxalign.types import PolicyBatch, TrainState


class Stage:
    """A stage's data, models and compiled steps.

    Args:
      config: one stage's configuration, validated, its `data.max_length` settled.
      mesh: of the devices it runs on.
      directory: of the run.
      lock: of that directory; None where nothing is trained.
      data: (config, tokenizer, ids that end a completion) -> data to train on and held-out data; None: as configured.

    Attributes:
      added: tokens that `model.path` has no vectors of; None where it has all.
      dataset: to train on.
      eval_dataset: held out; None where there is none.
      program: the algorithm on its models.
      num_steps: batches of the data stream in the whole run.
      stop_ids: tokens that end a completion.
      like: shapes, dtypes and shardings of the state.
      step: the compiled train step.
      remat: its rematerialisation policy where `model.remat=auto` was settled; "" before, and where there is another.
      eval_step: the compiled evaluation step.

    Raises:
      InputError: data, tokenizer or models that cannot be used.
    """

    def __init__(
        self,
        config: Any,
        mesh: Mesh,
        directory: RunDir,
        lock: Lock | None = None,
        data: Callable[[Any, Any, tuple[int, ...]], tuple[Any, Any]] | None = None,
    ):
        from jaxalign.models.tokenizer import add_tokens, check_vocabulary, ids_of, load_tokenizer, stop_ids

        c = config
        self.config, self.mesh, self.directory, self.lock = config, mesh, directory, lock
        if c.model.remat == "offload":
            require_host_memory(mesh, "model.remat='offload'", "--config.model.remat=full")
        self.offload = c.algorithm.get("offload", False)
        if self.offload:
            require_host_memory(mesh, "algorithm.offload", "--config.algorithm.offload=False")
        described = describe_start(c)
        path = c.model.tokenizer or c.model.path
        with named("model.tokenizer" if c.model.tokenizer else "model.path"):
            values = template_kwargs(c.data.chat_template_kwargs)
            self.tokenizer = load_tokenizer(path, revision_of(path, c), c.model.chat_template, values)
        self.added = add_tokens(self.tokenizer, c.model.add_tokens, described.vocab_size)
        check_vocabulary(self.tokenizer, (self.added or described).vocab_size, c.model.path)
        ends = stop_ids(c.model.path, self.tokenizer, c.model.revision)
        self.dataset, self.eval_dataset = (data or read_data)(c, self.tokenizer, ends)
        if self.eval_dataset is not None and not c.data.eval_sources:  # taken from what the sources' `used` counts
            self.dataset.report["records"]["held_out"] = self.eval_dataset.num_records
        if directory.untrained():
            self.write_report()
        self.num_steps = c.num_train_steps or self.dataset.batches_per_epoch * c.num_epochs

        more = more_stops(c.rollout.stop, self.tokenizer) if "rollout" in c else ()
        self.stop_ids = tuple(sorted({*ends, *more}))
        context = algorithms.Context(mesh, self.tokenizer, self.stop_ids, self.dataset, self.eval_dataset)
        self.program = algorithms.build(
            c, Roles(c, mesh, self.added, ids_of(self.tokenizer, c.model.add_tokens)), context
        )
        check_rate_factors(c.optimizer.rate_factors, [r.abstract() for r in self.program.trained.values()])
        exported = self.program.trained[self.program.exported]
        if adapter_base(exported) is not None:  # what could not be written at the end
            check_form(exported.model, exported.abstract())
        self._build_steps()

    def _build_steps(self) -> None:
        """The train and eval steps, and the state's shapes and shardings."""
        c, program, mesh = self.config, self.program, self.mesh
        updates = self.num_steps * program.updates
        rates = {role: r.learning_rate for role, r in program.trained.items()}
        self.optimizers = {
            role: make_optimizer(c.optimizer, rates[role], updates, r.model.config.adapter)
            for role, r in program.trained.items()
        }
        schedules = {role: make_schedule(c.optimizer, rate, updates) for role, rate in rates.items()}
        scaling = c.model.dtype == "float16"
        step = make_train_step(
            program.objective,
            self.optimizers,
            grad_accum_steps=c.grad_accum_steps,
            loss_scaling=scaling,
            early_stop=program.early_stop,
        )

        def train_step(state, frozen, batch):
            new, metrics = step(state, frozen, batch)
            for role, schedule in schedules.items():
                name = "learning_rate" if len(schedules) == 1 else f"learning_rate/{role}"
                metrics[name] = schedule(updates_made(state.opt[role]))
            return new, metrics

        self._train_step = train_step
        extra = dict(program.extra) | (LossScale.initial() if scaling else {})
        self.initial_extra = extra
        like = jax.eval_shape(lambda: self._fresh({n: r.abstract() for n, r in program.trained.items()}))
        whole = replicated(mesh)
        self.shardings = TrainState(
            step=whole,
            params=param_shardings(mesh, like.params),
            opt=param_shardings(mesh, like.opt),
            extra=jax.tree.map(lambda _: whole, like.extra),
            data_cursor=whole,
        )
        self.like = abstract(like, self.shardings)
        self.step, self.remat = self.step_with(None), ""
        evaluate = make_eval_step(program.objective, grad_accum_steps=c.grad_accum_steps)
        self.eval_step = Compiled(evaluate, "eval step", out_shardings=whole)

    def step_with(self, remat: str | None) -> Compiled:
        """The train step, not compiled yet.

        Args:
          remat: the policy of models that leave it to the machine (`model.remat=auto`).
        """

        def train_step(state, frozen, batch):
            with settled_remat(remat) if remat else contextlib.nullcontext():
                return self._train_step(state, frozen, batch)

        def tokens(state, frozen, batch):
            rows = batch.batch.rows if isinstance(batch, PolicyBatch) else batch.rows
            return rows.tokens.size // (batch_shards(self.mesh) * self.config.grad_accum_steps)

        out = (self.shardings, replicated(self.mesh))
        return Compiled(train_step, "train step", donate=(0,), out_shardings=out, tokens=tokens)

    def _fresh(self, params) -> TrainState:
        """The state of step 0 with these parameters; under `eval_shape`, its shapes."""
        if any(not isinstance(x, jax.Array) for x in jax.tree.leaves(params)):
            params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        opt = {role: tx.init(params[role]) for role, tx in self.optimizers.items()}
        extra = {name: jnp.asarray(value) for name, value in self.initial_extra.items()}
        return TrainState(jnp.int32(0), params, opt, extra, jnp.int32(0))

    def check_weights(self) -> None:
        """Refuses weights that cannot be loaded, before anything is compiled; plans for a target machine need none."""
        program = self.program
        for role in (*program.trained.values(), *program.frozen.values(), program.reference):
            if role is not None:
                role.check()

    def start(self) -> TrainState:
        """The state of step 0 on the mesh."""
        params = {name: role.load() for name, role in self.program.trained.items()}
        opt = {
            role: jax.jit(tx.init, out_shardings=self.shardings.opt[role])(params[role])
            for role, tx in self.optimizers.items()
        }
        whole = replicated(self.mesh)
        # A copy for each leaf: donated arrays must not be shared.
        extra = {name: jax.device_put(jnp.array(value, copy=True), whole) for name, value in self.initial_extra.items()}
        zero = lambda: jax.device_put(jnp.int32(0), whole)  # noqa: E731
        return TrainState(zero(), params, opt, extra, zero())

    def frozen(self) -> dict[str, Any]:
        """The frozen parameters on the mesh, each source loaded once.

        With `algorithm.offload` in host memory, but for the rest of models that are trained in part.
        """

        def read(name: str, role: Role) -> Any:
            return in_memory(role.load(), HOST if self.offload and name not in self.program.trained else DEVICE)

        return shared(self.program.frozen, read)

    def write_report(self) -> None:
        """Writes `data_report.json`: what was read, used and dropped."""
        self.directory.write_json("data_report.json", self.dataset.report)


def read_data(config: Any, tokenizer: Any, eos_ids: tuple[int, ...]) -> tuple[Any, Any]:
    """The data to train on and the held-out data of a stage, None where there are none."""
    from jaxalign.data.build import build

    dataset = build(config, tokenizer, eos_ids=eos_ids)
    return dataset, build(config, tokenizer, "eval", eos_ids=eos_ids, like=dataset)


def stage_warnings(stage: Stage) -> list[str]:
    """Warnings about a stage as a whole, before its first step: its length, its mesh, its data."""
    c = stage.config
    found = [*unsplit(stage.mesh, stage.like.params)]
    if note := only_here(stage.program.trained[stage.program.exported].model.config):
        found.append(note)
    if stage.added is not None:
        found += _added_warnings(c, stage.program.trained[stage.program.exported])
    found += _rank_warnings(c, stage.program.trained[stage.program.exported])
    if not c.adapter.rank:  # else the configuration's own warnings know of adapters
        usual = defaults(c.algorithm.name)
        for name, role in stage.program.trained.items():
            field = "value_learning_rate" if name == "value" else "learning_rate"
            if role.model.config.adapter is not None and c.optimizer[field] == usual.optimizer[field]:
                found.append(
                    f"the {name} model goes on from an adapter, and optimizer.{field} is {c.optimizer[field]:g}, the "
                    f"default of whole models; guides give adapters ten times as much: "
                    f"--config.optimizer.{field}={ADAPTER_RATE * c.optimizer[field]:g}"
                )
    policy, ref = stage.program.trained.get("policy"), stage.program.frozen.get("ref", stage.program.reference)
    if policy and ref and ref.model.config.quantised != policy.model.config.quantised:
        found.append(
            f"the reference's kernels are in {ref.model.config.quantised} and the policy's are not: rewards and KL do "
            "not begin at 0 (--config.model.frozen_dtype=None, or an adapter: --config.adapter.rank=16)"
        )
    if stage.num_steps * stage.program.updates == 1:
        rows = min(c.batch_size, stage.dataset.num_rows)
        longer = "num_epochs=10" if c.num_train_steps is None else "num_train_steps=100"
        found.append(
            f"1 update in all, of {rows:,} rows: next to nothing is learned; --config.{longer}, or a smaller "
            "--config.batch_size"
        )
    return found + [f"data: {said}" for said in data_warnings(stage.dataset, stage.eval_dataset)]


def _added_warnings(config: Any, role: Role) -> list[str]:
    """What a run that trains a part of its model makes of added tokens."""
    held, found = by_path(role.abstract()), []
    tables = [path for path in ENDS if path in by_path(role.model.abstract())]
    if frozen := [path for path in tables if path not in held and leaf_of(path) not in held]:
        trained = ",".join([*config.model.train, *(f"{path.partition('/')[0]}[added]" for path in frozen)])
        found.append(
            f"model.add_tokens, and {' and '.join(frozen)} frozen: all new tokens keep one vector, the mean of the "
            f"others, and cannot be told apart (--config.model.train='{trained}')"
        )
    if role.model.config.adapter is not None:
        found.append(
            "model.add_tokens with an adapter: export/ will be a whole model, the adapter merged, since the base has "
            "no vectors of these tokens"
        )
    return found


def _rank_warnings(config: Any, role: Role) -> list[str]:
    """Updates of a rank beyond their kernel's smaller side: of that rank they can be any matrix already."""
    leaves, wide, more = by_path(role.abstract()), {}, 0
    for path in [path for path in leaves if path.endswith("/lora_a")] if config.adapter.rank else ():
        a, b = leaves[path].shape, leaves[f"{path[:-1]}b"].shape
        inputs, outputs = math.prod(a[1:-1]), math.prod(b[2:])
        if (beyond := a[-1] - min(inputs, outputs)) > 0:
            wide[path.removeprefix("layers/").removesuffix("/lora_a")] = a[-1], inputs, outputs
            more += a[0] * beyond * (inputs + outputs) * leaves[path].dtype.itemsize
    if not wide:
        return []
    matrices = ", ".join(f"{path} ({inputs:,} x {outputs:,})" for path, (_, inputs, outputs) in wide.items())
    least = (*((path, min(sides)) for path, (_, *sides) in wide.items()), *config.adapter.rank_pattern)
    return [
        f"adapter: rank {max(rank for rank, *_ in wide.values()):,} is beyond the smaller side of {matrices}, whose "
        f"updates can be any matrix at that side's rank: {more / 2**20:.3g} MiB of parameters more, and gradients and "
        f"moments of them, for nothing (--config.adapter.rank_pattern={shlex.quote(json.dumps(least))})"
    ]


def data_warnings(dataset: Any, eval_dataset: Any) -> list[str]:
    """Warnings about the training data, its batches and the held-out data."""
    found = list(dataset.report["warnings"])
    if dataset.num_rows < dataset.batch_size:
        fits = 1 << (dataset.num_rows.bit_length() - 1)
        found.append(
            f"a batch has {dataset.batch_size} rows and the data fill only {dataset.num_rows}, the rest is padding: "
            f"--config.batch_size={fits}"
        )
    overlap = {} if eval_dataset is None else eval_dataset.report.get("overlap", {})
    if overlap.get("prompts"):
        found.append(f"{overlap['prompts']} held-out records have prompts that training has too")
    return found


def more_stops(stop: Any, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of `rollout.stop`, which holds ids or strings of one token."""
    found = []
    for item in stop:
        if isinstance(item, int):
            if item >= len(tokenizer):
                raise InputError(
                    f"rollout.stop holds the id {item}, and the tokenizer has {len(tokenizer)} tokens",
                    f"ids below {len(tokenizer)}",
                    "--config.rollout.stop=()",
                )
            found.append(item)
            continue
        ids = tokenizer.encode(item, add_special_tokens=False)
        if len(ids) != 1:
            raise InputError(
                f"rollout.stop {item!r} is {len(ids)} tokens", "one token of the tokenizer", "--config.rollout.stop=()"
            )
        found.append(ids[0])
    return tuple(found)

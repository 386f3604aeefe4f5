"""One training stage from configuration to exported model."""

from __future__ import annotations

import functools
import os
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign import config as configuration
from jaxalign.config import Validated, validated
from jaxalign.errors import InputError, named
from jaxalign.ops.precision import require_dtypes
from jaxalign.ops.trees import joined
from jaxalign.parallel import processes, startup
from jaxalign.parallel.host_memory import DEVICE, HOST, in_memory, require_host_memory
from jaxalign.parallel.mesh import batch_shards, make_mesh
from jaxalign.parallel.sharding import param_shardings, replicated, unsplit
from jaxalign.parallel.watch import watched
from jaxalign.steps.loss_scale import LossScale
from jaxalign.steps.step import make_eval_step, make_train_step
from jaxalign.train import algorithms
from jaxalign.train.best import Patience, check_best_metric, rarely
from jaxalign.train.card import model_card
from jaxalign.train.checkpoints import Checkpoints, abstract
from jaxalign.train.compiled import Compiled, memory_errors, peak_memory, reset_peak_memory
from jaxalign.train.flops import flops_per_token, peak_flops
from jaxalign.train.health import Health
from jaxalign.train.inputs import check_past, inputs_of
from jaxalign.train.lock import Lock, exclusive
from jaxalign.train.loop import Loop, make_evaluate
from jaxalign.train.metrics import Writer, read_metrics, say
from jaxalign.train.models import Roles, bytes_by_role, describe_start, fit_length, num_bytes, per_source, revision_of
from jaxalign.train.optimizer import make_optimizer, make_schedule, updates_made
from jaxalign.train.room import check_room
from jaxalign.train.rundir import RunDir, beside, require_shared
from jaxalign.train.trackers import check_trackers
from jaxalign.types import TrainState


def run(config: Any, *, dry_run: bool = False, devices: Any = None) -> dict[str, Any]:
    """Trains one stage, or resumes one that was stopped, and exports its model to `workdir/export`.

    Args:
      config: a tree made from `jaxalign.config.defaults`, or one that has been validated: then its warnings were told.
      dry_run: parse, report the data, show three rows with their masks, compile and estimate memory; train nothing.
      devices: those of the mesh; all by default.

    Returns:
      `steps`, `metrics` (last training step), `eval`, `wall_seconds`, `tokens_per_second`, `peak_memory_bytes`,
      `step_memory` (bytes by the compiler's account), `model_bytes` by role, `num_compiles` of the train step,
      `export`, `warnings` (what speaks against the run, in words); the same is written to `DONE`, and returned at
      once when the stage is done already.

    Raises:
      InputError: anything in configuration, data or learning that the user can change, or another run that is at work
        in the same directory.
      Interrupted: asked to stop; the state is saved and the same call resumes.
    """
    started = time.monotonic()
    reset_peak_memory()
    checked = config if isinstance(config, Validated) else validated(config)
    told, config = () if checked is config else checked.warnings, checked.config
    require_dtypes(**{name: config.model[name] for name in ("dtype", "param_dtype", "frozen_dtype")})
    check_trackers(config.logging.trackers)
    config, of_lengths = fit_length(config)
    for warning in (*told, *(said for said in of_lengths if said not in checked.warnings)):
        warnings.warn(warning, stacklevel=2)
    startup.start(config.process_timeout)
    mesh = make_mesh(config.mesh, devices)
    _check_batch(config, mesh)
    directory = RunDir(config.workdir)
    directory.make()
    with watched(config.process_timeout), exclusive(directory.path) as lock:
        if not dry_run:
            require_shared(directory)
            done = directory.open(configuration.to_dict(config), resume=config.checkpoint.resume)
            if done is not None:
                if lost := directory.lost_export():
                    say(f"warning: {lost}")
                return done
        processes.on_main(functools.partial(_check_export, directory))
        with jax.set_mesh(mesh):
            stage = Stage(config, mesh, directory, lock)
            stage.check_weights()
            if dry_run:
                from jaxalign.train.dryrun import report

                return report(stage)
            with memory_errors(f"{config.algorithm.name} stage"):
                results = stage.train()
        results |= {"wall_seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory()}
        directory.write_json("DONE", results)
    return results


class Stage:
    """A stage's data, models and compiled steps."""

    def __init__(self, config: Any, mesh: Mesh, directory: RunDir, lock: Lock | None = None):
        from jaxalign.data.build import build
        from jaxalign.models.tokenizer import check_vocabulary, load_tokenizer, stop_ids

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
            self.tokenizer = load_tokenizer(path, revision_of(path, c), c.model.chat_template)
        check_vocabulary(self.tokenizer, described.vocab_size, c.model.path)
        ends = stop_ids(c.model.path, self.tokenizer, c.model.revision)
        self.dataset = build(c, self.tokenizer, eos_ids=ends)
        self.eval_dataset = build(c, self.tokenizer, "eval", eos_ids=ends, like=self.dataset)
        if self.eval_dataset is not None and not c.data.eval_sources:  # taken from what the sources' `used` counts
            self.dataset.report["records"]["held_out"] = self.eval_dataset.num_records
        if directory.untrained():
            self.write_report()
        self.num_steps = c.num_train_steps or self.dataset.batches_per_epoch * c.num_epochs

        more = more_stops(c.rollout.stop, self.tokenizer) if "rollout" in c else ()
        self.stop_ids = tuple(sorted({*ends, *more}))
        context = algorithms.Context(mesh, self.tokenizer, self.stop_ids, self.dataset, self.eval_dataset)
        self.program = algorithms.build(c, Roles(c, mesh), context)
        self._build_steps()

    def _build_steps(self) -> None:
        """The train and eval steps, and the state's shapes and places."""
        c, program, mesh = self.config, self.program, self.mesh
        updates = self.num_steps * program.updates
        rates = {role: r.learning_rate for role, r in program.trained.items()}
        self.optimizers = {role: make_optimizer(c.optimizer, rate, updates) for role, rate in rates.items()}
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
        self.step = Compiled(train_step, "train step", donate=(0,), out_shardings=(self.shardings, whole))
        self.eval_step = Compiled(make_eval_step(program.objective), "eval step", out_shardings=whole)

    def _fresh(self, params) -> TrainState:
        """The state of step 0 around parameters; under `eval_shape`, its shapes."""
        if any(not isinstance(x, jax.Array) for x in jax.tree.leaves(params)):
            params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        opt = {role: tx.init(params[role]) for role, tx in self.optimizers.items()}
        extra = {name: jnp.asarray(value) for name, value in self.initial_extra.items()}
        return TrainState(jnp.int32(0), params, opt, extra, jnp.int32(0))

    def check_weights(self) -> None:
        """Refuses checkpoints that cannot be loaded, before anything is compiled; a machine is planned without them."""
        program = self.program
        for role in (*program.trained.values(), *program.frozen.values(), program.reference):
            if role is not None:
                role.check()

    def start(self) -> TrainState:
        """The state of step 0 on the mesh."""
        params = {name: role.part(role.load()) for name, role in self.program.trained.items()}
        opt = {
            role: jax.jit(tx.init, out_shardings=self.shardings.opt[role])(params[role])
            for role, tx in self.optimizers.items()
        }
        whole = replicated(self.mesh)
        # A copy of its own for each leaf: what is donated must not be shared with anything.
        extra = {name: jax.device_put(jnp.array(value, copy=True), whole) for name, value in self.initial_extra.items()}
        zero = lambda: jax.device_put(jnp.int32(0), whole)  # noqa: E731
        return TrainState(zero(), params, opt, extra, zero())

    def frozen(self) -> dict[str, Any]:
        """The frozen parameters on the mesh, with `algorithm.offload` in the host's memory; of each source once."""
        kind = HOST if self.offload else DEVICE
        return per_source(self.program.frozen, lambda role: in_memory(role.load(), kind))

    def train(self) -> dict[str, Any]:
        """Trains to the end, exports, and says how it went."""
        c, program = self.config, self.program
        check_best_metric(self)
        for sentence in unsplit(self.mesh, self.like.params):
            warnings.warn(sentence, stacklevel=2)
        for sentence in [*rarely(self), *(f"data: {said}" for said in data_warnings(self.dataset, self.eval_dataset))]:
            say(f"warning: {sentence}")
        checkpoints = Checkpoints(
            self.directory.checkpoints,
            keep=c.checkpoint.keep,
            best_metric=c.checkpoint.best_metric,
            best_mode=c.checkpoint.best_mode,
        )
        found = checkpoints.resume(self.like, whole=c.checkpoint.resume == "whole")
        start = found[0] if found else 0
        inputs = inputs_of(self)
        changes = check_past(self, start, found[2] if found else {}, inputs)
        if start < self.num_steps:
            for sentence in check_room(self, len(checkpoints.steps())):
                say(f"warning: {sentence}")
        self.directory.begin(configuration.to_dict(c))
        self.write_report()
        state = found[1] if found else self.start()
        dataset, eval_dataset = self.dataset, self.eval_dataset
        if program.reference is not None:
            from jaxalign.train.reference import attach

            dataset, eval_dataset = attach(self, [dataset, eval_dataset])
        frozen = self.frozen()
        writer = Writer(self.directory, c.logging, start=start, config=configuration.to_dict(c))
        past = read_metrics(self.directory)
        loop = Loop(
            name=c.algorithm.name,
            config=c,
            mesh=self.mesh,
            frozen=frozen,
            step=self.step,
            prepare=program.prepare,
            dataset=dataset,
            num_steps=self.num_steps,
            checkpoints=checkpoints,
            writer=writer,
            health=Health(past, beta=c.algorithm.get("beta")),
            evaluate=self._evaluate(frozen, eval_dataset),
            sample=self._sampler(),
            seconds_per_token=self._seconds_per_token(),
            meta={
                "config": configuration.to_dict(c),
                "mesh": dict(self.mesh.shape),
                "algorithm": c.algorithm.name,
                "inputs": inputs,
                "changes": changes,
            },
            directory=self.directory,
            patience=Patience(c, (row for row in past if row["step"] <= start)),  # process 0 may still be cutting it
            lock=self.lock,
            offload=self.offload,
        )
        try:
            state, results = loop.run(state, start)
            checkpoints.wait()
        finally:
            try:
                writer.close()
            finally:
                checkpoints.close()
        if start == results["steps"]:  # it had come to its end before: all that was left to do is to export
            results |= last_figures(read_metrics(self.directory))
        results["export"] = self._export(state, checkpoints, frozen, results["steps"], inputs)
        results |= {
            "num_compiles": self.step.num_compiles,
            "step_memory": self.step.memory,
            "model_bytes": bytes_by_role(state.params, frozen),
            "optimizer_bytes": num_bytes(state.opt),
        }
        return results

    def write_report(self) -> None:
        """Writes what the data are and what became of them to `data_report.json`."""
        self.directory.write_json("data_report.json", self.dataset.report)

    def _evaluate(self, frozen, dataset):
        if dataset is None:
            return None
        count = min(self.config.eval.num_batches or dataset.batches_per_epoch, dataset.batches_per_epoch)
        if self.program.evaluate is not None:
            measure = functools.partial(self.program.evaluate, records=dataset.record)
            whole = lambda state: state._replace(params=joined(state.params, frozen))  # noqa: E731
            step = lambda state, frozen, batch: measure(whole(state), frozen, batch)  # noqa: E731
        else:
            step = lambda state, frozen, batch: self.eval_step(state.params, frozen, state.extra, batch)  # noqa: E731
        return make_evaluate(step, frozen, dataset, count, self.mesh)

    def _sampler(self):
        if not self.config.logging.get("samples_every", 0):
            return None
        from jaxalign.train.samples import Sampler

        return Sampler(self)

    def _seconds_per_token(self) -> float | None:
        """Device seconds that a token costs at the hardware's peak; None where the peak is not known."""
        peak = peak_flops(jax.local_devices()[0].device_kind)
        if peak is None:
            return None
        length = self.dataset.shape[1]
        flops = sum(
            flops_per_token(role.model.config, length, passes=self.program.passes)
            for role in self.program.trained.values()
        )
        return flops / (peak * self.mesh.size)

    def _export(
        self, state: TrainState, checkpoints: Checkpoints, frozen: dict[str, Any], step: int, inputs: dict[str, str]
    ) -> str:
        """Writes the best parameters where a metric says which, else the last, in Hugging Face form."""
        from jaxalign.models import hf
        from jaxalign.models.hub import locate

        c, role = self.config, self.program.exported
        best = checkpoints.best()
        if c.checkpoint.best_metric and best != step:
            state, step = checkpoints.restore(best, self.like)[0], best
        target = os.fspath(self.directory.export)
        hf.save(
            target,
            self.program.trained[role].model,
            joined(state.params, frozen)[role],
            source=locate(c.model.path, c.model.revision, weights=False),
            tokenizer=self.tokenizer,
            card=model_card(self.directory, configuration.to_dict(c), step, inputs),
        )
        return target


def data_warnings(dataset: Any, eval_dataset: Any) -> list[str]:
    """What speaks against the training data, its batches, and what is held out beside it."""
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
    """Ids of `rollout.stop`: ids themselves, or strings that are one token."""
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


def last_figures(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The `metrics` and `eval` of a run's results, from the rows that it has written."""
    figures = [{k: v for k, v in row.items() if k not in ("step", "time")} for row in rows]
    train = [row for row in figures if any(k == "loss" or k.startswith("loss/") for k in row)]
    held_out = [row for row in figures if any(k.startswith("eval/") for k in row)]
    return {"metrics": train[-1] if train else {}, "eval": held_out[-1] if held_out else {}}


def _check_export(directory: RunDir) -> None:
    """Refuses what the end of the run could not write over, before it begins."""
    from jaxalign.models.export import check_target

    try:
        check_target(directory.export)
    except InputError as error:
        fix = f"mv {directory.export} ELSEWHERE, or --config.workdir={beside(directory.path)}"
        raise InputError(error.found, error.expected, fix) from error
    if not directory.remote and os.path.ismount(directory.export):
        raise InputError(
            f"{directory.export} is a mount point, which the export cannot take the place of",
            "a workdir whose export/ is a directory of its own, or not there yet",
            f"--config.workdir={directory.export / 'run'}",
        )


def _check_batch(config: Any, mesh: Mesh) -> None:
    """Refuses a batch that the mesh and the micro-batches do not divide."""
    parts = batch_shards(mesh) * config.grad_accum_steps
    if config.batch_size % parts:
        raise InputError(
            f"batch_size {config.batch_size} in {config.grad_accum_steps} micro-batches on "
            f"{batch_shards(mesh)} batch shards (data x fsdp)",
            f"a multiple of {parts}",
            f"--config.batch_size={-(-config.batch_size // parts) * parts}",
        )

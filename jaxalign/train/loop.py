"""The one loop of every algorithm: prepare a batch, step on it, read the figures one step late, save, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.data.prefetch import prefetch
from jaxalign.errors import InputError
from jaxalign.ops.trees import joined
from jaxalign.parallel.host_memory import DEVICE, HOST, moved
from jaxalign.parallel.processes import say
from jaxalign.parallel.sharding import batch_part, batch_sharding, put_batch, replicated
from jaxalign.train.autosave import Autosave
from jaxalign.train.best import Patience
from jaxalign.train.checkpoints import Checkpoints
from jaxalign.train.compiled import Compiled
from jaxalign.train.health import Health
from jaxalign.train.interrupts import Interrupted, StopRequests
from jaxalign.train.lock import Lock
from jaxalign.train.metrics import Progress, Writer, count_tokens, headline
from jaxalign.train.prepare import Prepare, Prepared
from jaxalign.train.profile import Profile
from jaxalign.train.schedule_free import evaluated
from jaxalign.types import Params, TrainState


class Pending(NamedTuple):
    """A batch of the data stream whose updates have been dispatched; its metrics are still on the device."""

    step: int  # batches done with it
    updates: list[dict[str, jax.Array]]  # metrics of each update
    prepared: dict[str, float]
    samples: list[dict[str, Any]] | None  # completions that `prepare` has sampled
    batch: Any  # the host's own rows
    compile_seconds: float
    ended: Callable[[], float]  # waits for the updates; the time of `time.monotonic` at which they were done


@dataclasses.dataclass
class Loop:
    """Drives a state through batches `start + 1 ... num_steps` of the stream."""

    name: str
    config: Any
    mesh: Mesh
    frozen: dict[str, Params]
    step: Compiled  # (state, frozen, batch) -> (state, metrics)
    prepare: Prepare
    dataset: Any
    num_steps: int
    checkpoints: Checkpoints
    writer: Writer
    health: Health
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    # (state, frozen, step, samples of `prepare`) -> metrics
    sample: Callable[[TrainState, dict[str, Params], int, Any], dict[str, float]] | None = None
    seconds_per_token: float | None = None  # at the hardware's peak, for MFU
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    directory: Any = None  # of the run; a profile's trace goes there
    patience: Patience | None = None  # early stopping
    callbacks: tuple[Callable[[int, Mapping[str, float], TrainState], dict[str, float]], ...] = ()
    lock: Lock | None = None  # of the directory
    offload: bool = False  # the optimizer's state is in host memory except during updates
    against_saving: Callable[[], str] = lambda: ""  # why a checkpoint that is due by time is not made; "": nothing

    def run(self, state: TrainState, start: int) -> tuple[TrainState, dict[str, Any]]:
        """Trains.

        Args:
          state: placed on the mesh; donated.
          start: batches already done.

        Returns:
          The last state, and results: `steps` done, `metrics` and `eval` of the last step, `tokens_per_second` of the
          whole run, and `warnings`, sentences about what went wrong.

        Raises:
          InputError: a loss that is not finite or a batch without weight, with the step and the records; a state that
            is not finite when it is to be saved.
          Interrupted: asked to stop; the state is saved.
        """
        self._tokens, self._seconds = 0.0, 0.0
        state = self._optimizer_in(HOST, state)
        if start:
            say(f"{self.name}: resuming from step {start} of {self.num_steps}")
        progress = Progress(self.name, self.num_steps, start=start, enabled=self.config.logging.progress)
        profile = self._profile = Profile(self.directory, self.config.profile, start)
        figures: dict[str, float] = {}
        held_out: dict[str, float] = {}
        pending: Pending | None = None
        done, end = start, start if self._spent() else self.num_steps
        self._autosave = Autosave(self.config.checkpoint.every_minutes, start, self.against_saving)
        try:
            with StopRequests() as stop, contextlib.closing(self._batches(start, end)) as batches:
                self._mark = time.monotonic()
                for index, host in profile.over(batches):
                    state, this = self._advance(state, index, host)
                    with profile.phase("figures and logs"):
                        if pending is not None:
                            figures = self._read(pending, progress)
                        pending = this
                    if self.lock is not None:
                        self.lock.check()
                    signal = stop.at(index + 1)
                    due = self._due(index + 1) or bool(signal)
                    timed = self._autosave.due(index + 1)
                    if due or timed:
                        with profile.phase("figures and logs"):
                            figures, pending = self._read(this, progress), None
                        with profile.phase("eval, samples, save"):
                            found = self._pause(state, index + 1, this.samples, stopping=bool(signal), timed=timed)
                            if due:
                                self._call_back(state, index + 1, figures | found)
                        held_out = found or held_out
                        self._mark = time.monotonic()
                    if signal:
                        self.checkpoints.wait()
                        say(f"{self.name}: stopped at step {index + 1}, saved; the same command resumes")
                        raise Interrupted(128 + signal)
                    done = index + 1
                    if self._spent():
                        break
        finally:
            profile.close()
            progress.close()
        if self.patience is not None and self._spent() and done < self.num_steps:
            say(f"{self.name}: {self.patience.sentence(done)}")
        concern = self.health.concern()
        if concern:
            say(f"warning: {self.name}: {concern}")
        speed = self._tokens / self._seconds if self._seconds else None
        results = {"steps": done, "metrics": figures, "eval": held_out, "tokens_per_second": speed}
        early = {"stopped_early": True} if done < self.num_steps else {}
        return state, results | early | {"warnings": [concern] if concern else []}

    def _spent(self) -> bool:
        """Whether early stopping ends the run here."""
        return self.patience is not None and self.patience.spent

    def _batches(self, start: int, end: int) -> Generator[tuple[int, Any]]:
        part = batch_part(self.mesh)
        yield from prefetch(lambda i: self.dataset.batch(i, *part), start, end, depth=2)

    def _advance(self, state: TrainState, index: int, host: Any) -> tuple[TrainState, Pending]:
        """Dispatches all updates of batch `index` without waiting for them."""
        before = self.step.compile_seconds
        with self._profile.phase("prepare") as made_ready:
            trained = state.params
            made = Prepared(*self.prepare(self._whole(state), self.frozen, put_batch(host, self.mesh)))
            state, batches = made.state._replace(params=trained), made.batches
            # Read now: a metric may be an array of `state` itself, which the first step donates.
            prepared = {name: float(value) for name, value in jax.device_get(made.metrics).items()}
            made_ready.append(batches)
        inner = {name.removeprefix("time/"): value for name, value in prepared.items() if name.startswith("time/")}
        self._profile.split("prepare", inner)
        updates = []
        state = self._optimizer_in(DEVICE, state)
        for batch in batches:
            with self._profile.phase("update") as updated:
                batch = jax.device_put(batch, batch_sharding(self.mesh))
                state, metrics = self.step(state, self.frozen, batch)
                updates.append(metrics)
                updated.append(metrics)
        state = self._optimizer_in(HOST, state)
        cursor = jax.device_put(np.int32(index + 1), replicated(self.mesh))
        state = state._replace(data_cursor=cursor)
        compiling = self.step.compile_seconds - before
        return state, Pending(index + 1, updates, prepared, made.samples, host, compiling, note_end(updates))

    def _whole(self, state: TrainState) -> TrainState:
        """The state with whole models, trained and frozen parts joined, for readers that do not train."""
        return state._replace(params=joined(state.params, self.frozen))

    def _optimizer_in(self, kind: str, state: TrainState) -> TrainState:
        """The state with the optimizer's part in this kind of memory; unchanged without `offload`."""
        return state._replace(opt=moved(state.opt, kind)) if self.offload else state

    def _due(self, step: int) -> bool:
        """Whether the loop pauses at this step to evaluate, sample, save or call back."""
        c = self.config
        every = (c.eval.every, c.checkpoint.every, c.logging.get("samples_every", 0) if self.sample else 0)
        calls = self.callbacks and (step % c.logging.every == 0 or step == 1)
        return bool(calls) or step == self.num_steps or any(n and step % n == 0 for n in every)

    def _call_back(self, state: TrainState, step: int, figures: dict[str, float]) -> None:
        """Calls the user's callbacks with a step's metrics and the state, which the next step donates."""
        for callback in self.callbacks:
            if found := callback(step, figures, state):
                self.writer.write(step, found)

    def _pause(self, state: TrainState, step: int, samples: Any, *, stopping: bool, timed: bool) -> dict[str, float]:
        """Between two steps: evaluation, samples, a checkpoint; with a best metric, a checkpoint for each evaluation.

        Returns:
          The evaluation's figures, `eval/...`; empty where none was due.
        """
        c, last = self.config, step == self.num_steps
        due = last or bool(c.eval.every and step % c.eval.every == 0)
        best = bool(self.evaluate and c.checkpoint.best_metric)
        scheduled = last or stopping or (best and due) or bool(c.checkpoint.every and step % c.checkpoint.every == 0)
        save = scheduled or timed  # the clock chooses no best checkpoint: what it makes is not evaluated
        sums = self.checkpoints.checked(step, state) if save else {}  # before the model is evaluated or sampled from
        evaluating = self.evaluate is not None and (due or (scheduled and best))
        every = c.logging.get("samples_every", 0)
        sampling = bool(self.sample and not stopping and every and (last or step % every == 0))
        averaged = evaluated(state) if evaluating or sampling else state
        held_out: dict[str, float] = {}
        if self.evaluate and evaluating:
            held_out = {f"eval/{name}": value for name, value in self.evaluate(averaged).items()}
            if self.patience is not None:
                self.patience.add(step, held_out)
        row = dict(held_out)
        if self.sample and sampling:
            row |= self.sample(self._whole(averaged), self.frozen, step, samples)
        if row:
            self.writer.write(step, row)
        if save:
            self.writer.flush()
            self.checkpoints.save(step, state, {**self.meta, "step": step}, held_out, sums)
            self._autosave.saved(step)
        return held_out

    def _read(self, pending: Pending, progress: Progress) -> dict[str, float]:
        """Waits for a batch's metrics, checks them and writes them."""
        updates = [{k: float(v) for k, v in m.items()} for m in jax.device_get(pending.updates)]
        row = merge(updates) | pending.prepared
        ended = pending.ended()
        seconds, self._mark = max(ended - self._mark - pending.compile_seconds, 1e-9), ended
        tokens = row.pop("processed_tokens", None)  # PPO counts prompts and sampled tokens
        if tokens is None:
            tokens = count_tokens(pending.batch.rows) * batch_part(self.mesh)[1]
        speed = tokens / seconds
        row["tokens_per_second"], row["epoch"] = speed, pending.step / self.dataset.batches_per_epoch
        if self.seconds_per_token:
            row["mfu"] = speed * self.seconds_per_token
        row |= self.health.signs(row)
        for line in self.health.news(pending.step, row):
            say(f"warning: {self.name}: step {pending.step}: {line}")
        problem = self._problem(pending, updates)
        step, every = pending.step, self.config.logging.every
        if step % every == 0 or step in (1, self.num_steps) or problem:
            self.writer.write(step, row)
        if problem:
            raise problem
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        progress.update(step, headline(row), speed)
        return row

    def _problem(self, pending: Pending, updates: list[dict[str, float]]) -> InputError | None:
        """The error that ends the run: a loss that is not finite, or a batch without weight."""
        ids = sorted({int(i) for i in np.asarray(pending.batch.record_ids).ravel() if i >= 0})
        where = f"step {pending.step}, records {_shortened(ids)}"
        for metrics in updates:
            losses = {k: v for k, v in metrics.items() if k == "loss" or k.startswith("loss/")}
            if metrics.get("skipped") or not all(math.isfinite(v) for v in losses.values()):
                self.checkpoints.wait()
                good = self.checkpoints.latest()
                figures = ", ".join(f"{k} {v}" for k, v in metrics.items() if k.startswith(("loss", "grad_norm")))
                return InputError(
                    f"a loss or gradient that is not finite at {where}: {figures}",
                    "finite numbers; "
                    + (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"),
                    "look at those records; --config.optimizer.learning_rate smaller, or warmup_steps larger; "
                    + self._elsewhere(),
                )
        # An update without weight changed nothing and is skipped, as is the smaller batch at an epoch's end, unless the
        # epoch has no other.
        if (
            updates
            and all(map(weightless, updates))
            and (self.dataset.batches_per_epoch == 1 or self.dataset.is_whole(pending.step - 1))
        ):
            expected, fix = _why_empty(pending.batch, pending.prepared)
            found = f"a batch that nothing can be learned from at {where}"
            return InputError(found, expected, f"{fix}; {self._elsewhere()}")
        return None

    def _elsewhere(self) -> str:
        """How to run with other fields: this directory only takes those that its run was begun with."""
        return f"with --config.workdir=ANOTHER, or remove {self.config.workdir}"


def note_end(updates: Any) -> Callable[[], float]:
    """Records when arrays become ready; the function that it returns waits for that and gives the time.

    The time at which the loop reads them would be too late: by then the next batch may have been prepared, or, where
    dispatch is synchronous (several processes on CPUs), trained on.
    """
    noted: list[float] = []

    def wait() -> None:
        with contextlib.suppress(Exception):  # the reader of the arrays gets the error
            jax.block_until_ready(updates)
        noted.append(time.monotonic())

    if all(x.is_ready() for x in jax.tree.leaves(updates)):
        wait()
        return noted.pop
    # No daemon: the interpreter waits for it, as the runtime does for the updates; one that was inside the runtime when
    # the interpreter goes would abort the process.
    thread = threading.Thread(target=wait, name="end of updates", daemon=False)
    thread.start()

    def ended() -> float:
        thread.join()
        return noted[0]

    return ended


def merge(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of one batch of the data stream: means over its updates, for flags and counts the sum.

    Updates without weight count in the flags only; `empty` is their number.

    >>> merge([{"loss": 1.0, "weight": 2.0, "skipped": 0.0}, {"loss": 3.0, "weight": 2.0, "skipped": 1.0}])
    {'loss': 2.0, 'weight': 2.0, 'skipped': 1.0}
    >>> merge([{"loss": 1.0, "weight": 2.0, "skipped": 0.0}, {"loss": 0.0, "weight": 0.0, "skipped": 0.0}])
    {'loss': 1.0, 'weight': 2.0, 'skipped': 0.0, 'empty': 1.0}
    >>> merge([{"loss": 0.0, "weight": 0.0, "skipped": 0.0}])
    {'weight': 0.0, 'skipped': 0.0, 'empty': 1.0}
    """
    if not updates:
        return {}
    summed, standing = ("skipped", "stopped", "overflow", "tokens"), ("weight", "param_norm", "learning_rate")
    telling = [u for u in updates if not weightless(u)]
    found = {}
    for name in updates[0]:
        if name in summed:
            found[name] = math.fsum(u[name] for u in updates)
        elif telling or name.partition("/")[0] in standing:
            over = telling or updates
            found[name] = math.fsum(u[name] for u in over) / len(over)
    return found | ({"empty": float(len(updates) - len(telling))} if len(telling) < len(updates) else {})


def weightless(metrics: Mapping[str, float]) -> bool:
    """Whether an update had no weight on any item."""
    return any(v == 0 for k, v in metrics.items() if k == "weight" or k.startswith("weight/"))


def _shortened(ids: list[int]) -> str:
    text = ", ".join(map(str, ids[:16]))
    return f"[{text}{f', ... {len(ids)} in all' if len(ids) > 16 else ''}]"


def _why_empty(batch: Any, prepared: Mapping[str, float]) -> tuple[str, str]:
    """(expected, fix) for a batch of zero weight."""
    if prepared.get("objective/scores_share") == 0:
        return (
            "a score for some completion: the reward gave None for all",
            "a reward that applies to these prompts: --config.rewards.function=...",
        )
    if not np.any(batch.record_ids >= 0):
        return "records in every batch: this one holds only padding", "--config.batch_size smaller"
    if batch.readouts.mask.size and not np.any(batch.readouts.mask):  # prompts to sample from have no places
        return (
            "tokens to train on: the records' masks leave none (a chat template without assistant turns, "
            "completions cut to nothing, or prompts that fill the row)",
            "--dry_run shows rows with their masks; --config.data.max_length larger, or another model.chat_template",
        )
    return "a positive weight on some record: all of these have weight 0", "the weight column of those records"


def make_evaluate(
    step: Callable[[TrainState, dict[str, Params], Any], dict[str, Any]],
    frozen: dict[str, Params],
    dataset: Any,
    num_batches: int,
    mesh: Mesh,
) -> Callable[[TrainState], dict[str, float]]:
    """Evaluation on the same batches each time: sums and weights are added over all of them and divided once.

    Args:
      step: (state, frozen, batch on the mesh) -> {name: (sum, weight)}; of several terms [terms] each, whose quotients
        are added.
      frozen: by role.
      dataset: of which the first batches are used.
      num_batches: how many.
      mesh: where they go.
    """

    def evaluate(state: TrainState) -> dict[str, float]:
        totals: dict[str, list[Any]] = {}
        for index in range(num_batches):
            batch = put_batch(dataset.batch(index, *batch_part(mesh)), mesh)
            for name, (total, weight) in jax.device_get(step(state, frozen, batch)).items():
                entry = totals.setdefault(name, [0.0, 0.0])
                entry[0] += np.asarray(total, np.float64)
                entry[1] += np.asarray(weight, np.float64)
        return {
            name: float(np.sum(np.where(weight, total, 0) / np.where(weight, weight, 1)))
            for name, (total, weight) in totals.items()
            if np.any(weight)
        }

    return evaluate

"""The programs of a stage, compiled ahead of time for devices that need not be there.

XLA compiles for a described machine as well as for one that is there; no device is touched. The compilers come with
the extra `plan`. An answer takes the CPU seconds of the compilations and reads no weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.ops.trees import joined
from jaxalign.parallel.device_memory import device_bytes, repeated_bytes
from jaxalign.parallel.sharding import batch_part, param_shardings
from jaxalign.plan.collection import collection
from jaxalign.rollout.pairs import completions_per_row
from jaxalign.train import compiled
from jaxalign.train.arguments import batch_of, step_arguments, widest_prompts
from jaxalign.train.checkpoints import abstract
from jaxalign.train.flops import flops_per_token
from jaxalign.train.reference import reference_pass
from jaxalign.train.remat import settle_remat
from jaxalign.types import Params


class Work(NamedTuple):
    """What the rows of one run of a program hold."""

    tokens: float  # of all devices, without padding
    visible: float  # keys that a token sees, on average
    share: float  # of all pairs of a query and a key in a row that are seen
    fill: float  # share of the rows' tokens that are no padding


class Program(NamedTuple):
    """A compiled program of a stage, and what lies in a device's memory while it runs."""

    name: str
    times: float  # runs in one step of the data stream (PPO: an iteration)
    memory: dict[str, int]  # bytes of each device: what is held, by role, and what the program adds
    compiled: dict[str, int]  # the compiler's own account, see `memory_of`
    text: str  # its optimised HLO
    flops: float  # the model's own, one run, all devices
    work: Work
    read: dict[str, int]  # for a decoded token of every row, by each device: bytes of weights and cache; its columns
    seconds: float  # of compiling

    @property
    def peak(self) -> int:
        """Bytes of each device while it runs."""
        return sum(self.memory.values())


def programs(stage: Any, *, limit: int | None, say: Any = None, only: str = "") -> Iterator[Program]:
    """Compiles what a stage runs, one program after the other.

    Args:
      stage: as `jaxalign.plan.stages.make_stage` gives it.
      limit: bytes of a device that programs may use.
      say: is told of each program that is compiled.
      only: the name of the one that is wanted; "": all.

    Raises:
      InputError: a program that the compiler cannot fit into the device's memory.
    """
    tell = say or (lambda text: None)
    program, like = stage.program, stage.like
    _, frozen, batch = step_arguments(stage)
    rows = _data_rows(stage)
    held = {f"{role} params": device_bytes(tree) for role, tree in like.params.items()}
    moments = {"optimizer": device_bytes(like.opt)}
    if not stage.offload:  # else they wait in the host's memory, moments for the train step
        held |= moments
        held |= _frozen_bytes(frozen)
    models = {role: r.model.config for role, r in program.trained.items()}
    whole = _work(rows)

    def done(
        name: str, executable: Any, seconds: float, given: Any, times: float, flops: float, work: Work, **more: Any
    ):
        memory = held | more.pop("held", {}) | {"batch": device_bytes(given)}
        counted = more.pop("counted", None) or compiled.memory_of(executable, repeated_bytes(more.pop("arguments", ())))
        return Program(
            name,
            times,
            memory | _added(counted, memory),
            counted,
            executable.as_text(),
            flops,
            work,
            more.get("read", {}),
            seconds,
        )

    with jax.set_mesh(stage.mesh):
        settle_remat(stage, limit)
        if program.evaluate is None:
            tell("train step")
            executable, seconds = _timed(lambda: stage.step.compile(like, frozen, batch))
            per_token = {role: _flops(c, whole, program.passes) for role, c in models.items()}
            counted = stage.step.memory
            yield done("train step", executable, seconds, batch, 1.0, sum(per_token.values()), whole, counted=counted)
            if stage.eval_dataset is not None and not only:
                tell("evaluation step")
                held_out = batch_of(stage, stage.eval_dataset)
                executable, seconds = _timed(lambda: stage.eval_step.compile(like.params, frozen, like.extra, held_out))
                flops = sum(_flops(c, whole, program.forward) for c in models.values())
                counted = stage.eval_step.memory
                yield done("evaluation step", executable, seconds, held_out, 0.0, flops, whole, counted=counted)
            if program.reference is not None and not only:
                tell("reference pass")
                role = program.reference
                ref = abstract(role.abstract(), param_shardings(stage.mesh, role.abstract()))
                passed = reference_pass(role.model, stage.config.grad_accum_steps)
                executable, seconds = _timed(lambda: passed.compile(ref, batch))
                # Before training, without the state: its own weights alone lie there.
                held, of_training = {"ref": device_bytes(ref)}, held
                yield done(
                    "reference pass", executable, seconds, batch, 0.0, _flops(role.model.config, whole, 1.0), whole
                )
                held = of_training
            return
        calls = () if only else collection(stage, joined(like.params, frozen), frozen, widest_prompts(stage), limit)
        yield from _iteration(stage, frozen, batch, rows, models, done, tell, calls, moments)


def _frozen_bytes(frozen: Mapping[str, Params]) -> dict[str, int]:
    """Of each frozen role; arrays that several share, as adapters do their base, count for the first."""
    found: dict[str, int] = {}
    for i, role in enumerate(frozen):
        found[f"{role} (frozen)"] = device_bytes(list(frozen.values())[: i + 1]) - sum(found.values())
    return found


def _iteration(stage, frozen, batch, rows, models, done, tell, calls, moments) -> Iterator[Program]:
    """PPO's programs; completions are taken to be as long as they may be."""
    c, program, like = stage.config, stage.program, stage.like
    prompts = widest_prompts(stage)
    read, total = _work(rows), c.batch_size * c.rollout.num_samples
    wide, asked = c.rollout.max_new_tokens, prompts.rows.tokens.shape[1]
    prompt = read.tokens / c.batch_size  # tokens of one
    work = completed(total, completions_per_row(c.rollout.num_samples), prompt, asked, wide)
    frozen_models = {role: r.model.config for role, r in program.frozen.items()}
    policy = models["policy"]
    kept: dict[str, int] = {}  # what the rollout holds
    weights = looked_up = 0
    begin = time.monotonic()
    for call in calls:
        seconds, name = time.monotonic() - begin, call.name
        given = arrays = [x for x in jax.tree.leaves(call.arguments) if hasattr(x, "sharding")]
        flops, of, times, reads = 0.0, read, call.times, {}
        tell(name)
        if name == "prefill":
            # Logits are decoding's: the head is not in it.
            flops = _flops(policy, read, 1.0) - read.tokens * 2.0 * policy.embed_dim * policy.vocab_size
            given = jax.tree.leaves(prompts.rows)
            kept = {"prompts read": device_bytes(call.results)}
        elif name.startswith("layout"):
            weights += int(times) * device_bytes(call.results)
            if "lm_head" in call.results:  # the embedding is not the head too: a few rows of it are read
                looked_up = device_bytes(call.results["embed"])
            given, kept = [], kept | {"rollout weights": weights}
        elif name.startswith("decode"):
            slots = call.results[0]
            rows_at_once = slots.live.shape[0]
            of = Work(rows_at_once, prompt + wide / 2, 1.0, 1.0)
            flops, times = _flops(policy, of, 1.0), times * -(-total // rows_at_once)
            given = jax.tree.leaves(call.arguments[2:4])
            columns = max(keys.shape[-2] for keys in slots.cache.keys)  # fewer of a layer with a window
            reads = {"weights": weights - looked_up, "cache": device_bytes(slots.cache), "columns": columns}
        elif name == "scoring":
            of, kept = work._replace(tokens=work.tokens / times), _brought(stage, frozen["reward"])
            given, flops = given[-5:], _flops(frozen_models["reward"], of, 1.0)
        elif name == "forward passes":
            of, kept, given = work, _brought(stage, frozen["ref"]), given[-8:]
            flops = sum(_flops(m, work, 1.0) for m in (*models.values(), frozen_models["ref"]))
        more = {"arguments": arrays, "read": reads, "held": kept}
        one = done(name, call.executable, seconds, given, times, flops, of, **more)
        if name in ("prefill", "prompts to decoding") or name.startswith("layout"):
            one = one._replace(memory=one.memory | {"results": 0})  # they are held
        yield one
        begin = time.monotonic()
    tell("train step")
    executable, seconds = _timed(lambda: stage.step.compile(like, frozen, batch))
    part = work._replace(tokens=work.tokens / c.algorithm.num_minibatches)
    flops = sum(_flops(m, part, program.passes) for m in models.values())
    more = {"held": moments, "counted": stage.step.memory}
    yield done("train step", executable, seconds, batch, float(program.updates), flops, part, **more)


def completed(total: int, together: int, prompt: float, asked: int, wide: int) -> Work:
    """What rows of a prompt and its completions hold.

    Args:
      total: completions.
      together: of a row, as `jaxalign.rollout.pairs.completions_per_row`; each sees the prompt and itself.
      prompt: tokens of a prompt.
      asked: columns of a prompt.
      wide: tokens of a completion.
    """
    width, own = asked + together * wide, prompt + together * wide
    seen = 0.5 * prompt**2 + together * wide * (prompt + 0.5 * wide)  # pairs of a row
    return Work(total // together * own, seen / own, seen / width**2, own / width)


def _brought(stage: Any, params: Any) -> dict[str, int]:
    """Frozen parameters that are on the devices only while they are used."""
    return {"from the host": device_bytes(params)} if stage.offload else {}


def _added(counted: Mapping[str, int], held: Mapping[str, int]) -> dict[str, int]:
    """What a program adds to what is held: results that take over nothing, temporaries, and the padding of layouts."""
    return {
        "padding": max(counted["arguments"] - sum(held.values()), 0),
        "results": max(counted["results"], 0),
        "temporary": counted["temporary"],
    }


def _timed(make: Any) -> tuple[Any, float]:
    begin = time.monotonic()
    made = make()
    return made, time.monotonic() - begin


def _data_rows(stage: Any) -> Any:
    """The first batch's rows, as they come from the data."""
    return stage.dataset.batch(0, *batch_part(stage.mesh)).rows


def _work(rows: Any) -> Work:
    """Tokens and what they see, of rows on the host; padding sees itself alone."""
    start, end = np.asarray(rows.attend_start), np.asarray(rows.attend_end)
    keys = (end - start).astype(np.int64)
    index = np.arange(keys.shape[1])[None]
    real = (keys > 1) | (np.asarray(rows.positions) > 0) | (_sees(start, end, index))
    seen = float(keys[real].sum())
    tokens = max(float(real.sum()), 1.0)
    return Work(tokens, seen / tokens, seen / keys.size / keys.shape[1], tokens / keys.size)


def _sees(start: Any, end: Any, index: Any) -> Any:
    """Whether the next token sees this one, as it sees the first of its record."""
    after = np.roll(start, -1, axis=1)
    seen = (after <= index) & (np.roll(end, -1, axis=1) > index)
    seen[:, -1] = False
    return seen


def _flops(config: Any, work: Work, passes: float) -> float:
    return work.tokens * flops_per_token(config, 2 * work.visible, passes=passes)

"""What a stage holds on each device, by role and phase: its arrays, and the compiler's account of its programs."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.parallel.device_memory import device_bytes, num_bytes
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import batch_sharding
from jaxalign.rollout.layout import lay_out
from jaxalign.rollout.pairs import completions_per_row
from jaxalign.rollout.sampling import Sampling
from jaxalign.rollout.sizes import cache_width
from jaxalign.rollout.slots import advance, empty_draws, prefill, seat
from jaxalign.train.arguments import step_arguments, widest_prompts
from jaxalign.train.compiled import memory_of
from jaxalign.train.rundir import RunDir
from jaxalign.train.stage import Stage

STATE = ("weights", "frozen", "optimizer", "gradients")


def measure(config: Any, devices: Any) -> dict[str, Any]:
    """Bytes of one stage.

    Returns:
      - `weights`, `frozen`, `optimizer`, `gradients` (float32), and `state`, the four together;
      - `activations`: what the train step's temporary memory holds beside gradients at its fullest; `batch`;
      - `total`: of the train step, with all that is on the device meanwhile;
      - `host`: the most that waits in the host's memory, in whichever phase;
      - of PPO `cache` (keys and values), `sampling`, `scoring`: the other phases of an iteration, likewise;
      - `peak`: of all phases the most.
    """
    mesh = make_mesh(config.mesh, devices)
    with tempfile.TemporaryDirectory() as scratch:
        stage = Stage(config, mesh, RunDir(scratch))
        _, frozen, batch = step_arguments(stage)
        start = time.monotonic()
        with jax.set_mesh(mesh):
            executable = stage.step.compile(stage.like, frozen, batch)
            found = _step(stage, executable, frozen, batch)
            if config.algorithm.name == "ppo":
                found |= _sampling(stage, found) | _scoring(stage, frozen, batch, found)
    found["peak"] = max(found.get(phase, 0) for phase in ("total", "sampling", "scoring"))
    return found | {"compile_seconds": time.monotonic() - start, "rows": list(batch_shape(batch))}


def batch_shape(batch: Any) -> tuple[int, int]:
    """Rows and their length."""
    return (batch.rows if hasattr(batch, "rows") else batch.batch.rows).tokens.shape


def _step(stage: Any, executable: Any, frozen: Any, batch: Any) -> dict[str, int]:
    account = stage.step.memory
    if not account:
        raise SystemExit("found:    a compiler without a memory account\nexpected: one\nfix:      JAX_PLATFORMS=cpu")
    one = device_bytes
    gradients = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32), sharding=x.sharding),
        stage.like.params,
    )
    temporary = account["temporary"] + account["results"]
    parts = {
        "weights": one(stage.like.params),
        "frozen": one(frozen),
        "optimizer": one(stage.like.opt),
        "gradients": one(gradients),
        "activations": temporary - one(gradients),
        "batch": one(batch),
    }
    # What the step does not read (PPO's frozen models) is no argument of its program, and in memory all the same,
    # unless it waits elsewhere.
    waiting = parts["frozen"] if stage.offload else 0
    return parts | {
        "state": sum(parts[role] for role in STATE),
        "total": sum(parts.values()) - waiting,
        "host": executable.memory_analysis().host_temp_size_in_bytes
        + (waiting + parts["optimizer"] if stage.offload else 0),
        "temporary": temporary,
        "models": len(stage.like.params) + len(stage.program.frozen),
    }


def _sampling(stage: Any, parts: dict[str, int]) -> dict[str, int]:
    """The cache, and the memory while it is at its widest, the policy laid out for decoding beside it."""
    c, policy = stage.config, stage.program.trained["policy"].model
    new, widest = c.rollout.max_new_tokens, (c.batch_size, stage.dataset.shape.length)
    params, rows = stage.like.params["policy"], widest_prompts(stage).rows
    width = cache_width(widest[1] + new)
    ids = jax.ShapeDtypeStruct((c.batch_size * c.rollout.num_samples,), np.int32)
    laid = jax.eval_shape(lambda p: lay_out(policy, p), params)
    prefilled = jax.eval_shape(lambda p, r: prefill(policy, p, r), params, rows)
    slots = jax.eval_shape(lambda p, i: seat(p, i, width=width, arrays=len(laid["layers"])), prefilled, ids)
    draws = jax.eval_shape(lambda: empty_draws(batch=ids.shape[0], length=min(new, 128), dtype=jnp.float32))
    options = {"sampling": Sampling(1.0, new), "stop_ids": stage.stop_ids or (0,)}
    numbers = (jax.eval_shape(lambda: jax.random.key(0)), *(np.int32(0) for _ in range(2)))
    loop = advance.lower(policy, laid, slots, draws, *numbers, **options).compile()
    there = parts["weights"] + (0 if stage.offload else parts["frozen"] + parts["optimizer"])
    read = memory_of(prefill.lower(policy, params, rows).compile())["total"] - device_bytes(params)
    return {
        "cache": num_bytes((slots.cache.keys, slots.cache.values)),
        "laid out": num_bytes(laid),
        "sampling": there + max(read, memory_of(loop)["total"]),
    }


def _scoring(stage: Any, frozen: Any, batch: Any, parts: dict[str, int]) -> dict[str, int]:
    """The most while the reward model scores and policy, reference and value model read what was sampled."""
    c, prepare, sharding = stage.config, stage.program.prepare, batch_sharding(stage.mesh)
    minibatches = c.algorithm.num_minibatches

    def whole(x):
        return jax.ShapeDtypeStruct((x.shape[0] * minibatches, *x.shape[1:]), x.dtype, sharding=sharding)

    rows, readouts = jax.tree.map(whole, (batch.batch.rows, batch.batch.readouts))
    together = completions_per_row(c.rollout.num_samples)
    last = jax.ShapeDtypeStruct((rows.tokens.shape[0], together), np.int32, sharding=sharding)
    programs = [prepare.collector.forward.lower(stage.like.params, frozen["ref"], rows, readouts)]
    if "reward" in frozen:
        programs.append(prepare.collector.score.lower(frozen["reward"], rows, last))
    accounts = [memory_of(program.compile()) for program in programs]
    there = parts["weights"] + parts["frozen"] + device_bytes((rows, readouts))
    waiting = 0 if stage.offload else parts["optimizer"]
    return {"scoring": there + waiting + max(a["temporary"] + a["results"] for a in accounts)}

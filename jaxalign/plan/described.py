"""One stage's plan: its programs compiled, counted and timed, as numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from jaxalign.plan.account import Account, account
from jaxalign.plan.losses import losses_of
from jaxalign.plan.predict import Assumptions, alone_and_hidden, predict
from jaxalign.plan.programs import Program, programs
from jaxalign.plan.runs import length_of, run_of
from jaxalign.plan.stages import make_stage
from jaxalign.train.best import rarely
from jaxalign.train.stage import Stage, stage_warnings

_SHOWN = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}


def plan_stage(
    config: Any,
    devices: list[Any],
    assumed: Assumptions,
    say: Callable[[str], None],
    made: tuple[Stage, list[str]] | None = None,
    *,
    only: str = "",
) -> dict[str, Any]:
    """The plan of one stage, `made` by `make_stage` or made here; of one of its programs where `only` names it."""
    pool = int(assumed.machine.memory * assumed.values["pool"])
    with tempfile.TemporaryDirectory() as scratch:
        stage, told = made or make_stage(config, devices, scratch, assumed.values)
        order = list(stage.mesh.devices.flat)
        found = []
        for program in programs(stage, limit=pool, say=say, only=only):
            counted = account(program.text, 1, visible=min(max(program.work.share, 1e-3), 1.0))
            found.append(_described(program, counted, assumed, order, pool, config.model.dtype))
        mesh = {axis: int(size) for axis, size in stage.mesh.shape.items()}
        tokens = float(found[0]["tokens"])
        length = length_of(stage, int(assumed.values["steps"]))
        warnings = [*(rarely(stage, length.steps) if length.steps else ()), *stage_warnings(stage)]
    c = stage.config
    iteration = _iteration(found, assumed, len(order), tokens, c)
    return {
        "algorithm": c.algorithm.name,
        "fits": all(p["fits"] for p in found),
        "run": run_of(length, found, assumed.values, len(order)),
        "mesh": mesh,
        "settings": {
            "batch_size": c.batch_size,
            "grad_accum_steps": c.grad_accum_steps,
            "remat": f"auto: {stage.remat}" if stage.remat else c.model.remat,
            "row_length": int(stage.dataset.shape.length),
            "max_new_tokens": c.rollout.max_new_tokens if "num_minibatches" in c.algorithm else 0,
            "dtype": c.model.dtype,
        },
        "assumed": told,
        "warnings": warnings,
        "programs": found,
        "iteration": iteration,
        "losses": losses_of(found, c, mesh, assumed),
    }


def _described(
    program: Program, counted: Account, assumed: Assumptions, order: list[Any], pool: int, dtype: str
) -> dict[str, Any]:
    """A program's numbers."""
    time = predict(counted, assumed, order)
    own = program.flops / len(order)
    peak = assumed.values["flops"]
    resharded = counted.resharding()
    found = {
        "name": program.name,
        "times": program.times,
        "tokens": program.work.tokens,
        "fill": program.work.fill,
        "compile_seconds": round(program.seconds, 1),
        "memory": {**program.memory, "peak": program.peak, "pool": pool},
        "compiled": program.compiled,
        "fits": program.peak <= pool,
        "largest": [
            {"array": f"{a.shape.dtype}{list(a.shape.dims)}", "bytes": a.shape.bytes, "of": a.op_name or a.name}
            for a in counted.largest[:5]
        ],
        "flops": {
            "model": own,
            "products": counted.flops,
            "attention": counted.attention_flops,
            "other_dtype": counted.flops_outside(_SHOWN.get(dtype, dtype), "s8", "u8"),
        },
        "collectives": _collectives(counted, assumed, order),
        "resharding_bytes": sum(c.bytes * c.times for c in resharded),
        "traffic_bytes": counted.traffic_bytes,
        "traffic": [
            {"kernel": k.op_name or k.name, "count": k.times, "bytes": k.bytes * k.times} for k in counted.heaviest[:5]
        ],
        "host_bytes": counted.host_bytes,
        "product_bytes": counted.product_bytes,
        "kernels": counted.kernels,
        "seconds": time._asdict() | {"total": time.total},
        "mfu": own / peak / time.total if time.total else 0.0,
        "loops_assumed": counted.assumed_trips,
        "unknown_kernels": list(counted.unknown_kernels),
    }
    if program.read:
        moved = counted.traffic_bytes + counted.product_bytes
        found["decoding"] = {"bytes_per_token": moved} | program.read
    return found


def _collectives(counted: Account, assumed: Assumptions, order: list[Any]) -> list[dict[str, Any]]:
    """Collectives of a kind together, those that show most first."""
    found: dict[tuple, dict[str, Any]] = {}
    for c, seconds, behind in alone_and_hidden(counted, assumed, order):
        if c.group_size < 2:
            continue
        key = (c.piece_of or c.kind, c.dtype, c.loop, c.asynchronous, c.group_size)
        one = found.setdefault(
            key,
            {
                "kind": key[0],
                "dtype": c.dtype,
                "loop": c.loop.rsplit("/", 2)[-2] if c.loop.count("/") > 1 else c.loop,
                "asynchronous": c.asynchronous,
                "group": c.group_size,
                "count": 0,
                "bytes": 0.0,
                "seconds": 0.0,
                "exposed": 0.0,
            },
        )
        one["count"] += c.times
        one["bytes"] += c.bytes * c.times
        one["seconds"] += seconds * c.times
        one["exposed"] += (seconds - behind) * c.times
    return sorted(found.values(), key=lambda one: -one["exposed"])


def _iteration(
    found: list[dict[str, Any]], assumed: Assumptions, devices: int, tokens: float, c: Any
) -> dict[str, Any]:
    """All programs of one step of the data stream, as often as each runs."""
    seconds = sum(p["seconds"]["total"] * p["times"] for p in found)
    flops = sum(p["flops"]["model"] * p["times"] for p in found)
    trained = [p for p in found if p["name"] == "train step"]
    if "num_minibatches" in c.algorithm and trained:
        tokens = trained[0]["tokens"] * c.algorithm.num_minibatches
    return {
        "seconds": seconds,
        "mfu": flops / assumed.values["flops"] / seconds if seconds else 0.0,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "tokens_per_second_per_device": tokens / seconds / devices if seconds else 0.0,
    }

"""Meshes, rematerialisation, accumulation and batches that fit a machine, the fastest first by prediction.

Memory and time are estimated by arithmetic first; what cannot fit is left out, and the best of the rest are compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.config import get
from jaxalign.errors import InputError
from jaxalign.parallel.mesh import AXES, make_mesh, mesh_shape
from jaxalign.plan.described import plan_stage
from jaxalign.plan.predict import Assumptions, link

_REMAT = ("none", "dots", "attention", "full")
AS_IS = "as configured"
_SLACK = 1.15  # of the pool: what is estimated to need a little more may fit


class Candidate(NamedTuple):
    """A configuration's fields that the search changes, and what is estimated of it."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulation: int
    batch: int
    memory: float  # bytes of a device, estimated
    seconds: float  # of a token, estimated

    def lines(self, beside: Candidate | None = None) -> str:
        """As flags.

        Args:
          beside: the configured one; what is the same there is left out.
        """
        names = ("mesh.data", "mesh.fsdp", "mesh.tensor", "model.remat", "grad_accum_steps", "batch_size")
        fields = dict(zip(names, self, strict=False))
        if beside is not None:
            first = 3 if self[:3] == beside[:3] else 0  # a mesh is said whole
            fields = {n: fields[n] for i, n in enumerate(names) if i >= first and (i < 3 or self[i] != beside[i])}
        return " ".join(f"--config.{field}={value}" for field, value in fields.items()) or AS_IS


class Sizes(NamedTuple):
    """What the arithmetic needs of a stage."""

    params: float  # numbers that are trained
    state: float  # bytes of parameters and optimizer, of all devices
    frozen: float  # bytes of frozen parameters, of all devices
    layers: int
    embed: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    length: int  # of a row
    batch: int
    minibatches: int
    passes: float  # forward passes' worth of a token, beside what is computed again
    temporary: float = 0.0  # bytes that the compiled step of `base` takes beside what is held, ...
    estimated: float = 0.0  # ... and those estimated for it
    resting: float = 0.0  # numbers of the trained models that are not trained: the base of adapters
    mlp_matrices: int = 3  # of a layer


def sizes_of(stage: Any) -> Sizes:
    """The sizes of a stage."""
    import jax

    from jaxalign.parallel.device_memory import num_bytes
    from jaxalign.train.arguments import frozen_parameters

    program, like = stage.program, stage.like
    model = program.trained[program.exported].model.config
    trained = sum(x.size for x in jax.tree.leaves(like.params))
    whole = sum(x.size for role in program.trained.values() for x in jax.tree.leaves(role.model.abstract()))
    c = stage.config
    count = get(c, "rollout.num_samples", 0)
    together = 2 if count and count % 2 == 0 else 1
    length = stage.dataset.shape.length + (c.rollout.max_new_tokens * together if count else 0)
    samples = count // together if count else 1
    return Sizes(
        params=trained,
        state=num_bytes(like.params) + num_bytes(like.opt),
        frozen=num_bytes(frozen_parameters(stage)),
        layers=model.num_layers,
        embed=model.embed_dim,
        mlp=model.mlp_dim,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab=model.vocab_size,
        length=length,
        batch=c.batch_size * samples,
        minibatches=c.algorithm.get("num_minibatches", 1),
        passes=program.passes,
        resting=whole - trained,
        mlp_matrices=model.mlp_matrices,
    )


def candidates(
    s: Sizes, config: Any, devices: int, slices: int, assumed: Assumptions, there: Sequence[Any] = ()
) -> list[Candidate]:
    """All that divide, those that are estimated to fit and to be fastest first.

    Args:
      s: of the stage.
      config: of the stage.
      devices: how many.
      slices: of a TPU, or joined groups of GPUs: `data` carries what goes between them.
      assumed: the machine and the numbers of the prediction.
      there: the devices themselves; without them all are taken to be joined by links.
    """
    pool = assumed.machine.memory * assumed.values["pool"] * _SLACK
    found = []
    for data, fsdp, tensor in _meshes(s, devices, slices):
        reach = bandwidths((data, fsdp, tensor), there, assumed)
        for remat in _REMAT:
            for batch in (config.batch_size, 2 * config.batch_size):
                for accumulation in (1, 2, 4, 8, 16, 32):
                    parts = data * fsdp * accumulation * s.minibatches
                    if batch % parts:
                        continue
                    one = Candidate(data, fsdp, tensor, remat, accumulation, batch, 0.0, 0.0)
                    scale = batch / config.batch_size
                    seconds = seconds_of(one, s, scale, assumed, reach)
                    one = one._replace(memory=memory_of(one, s, scale), seconds=seconds)
                    if one.memory <= pool:
                        found.append(one)
    return sorted(found, key=lambda one: one.seconds)


def _meshes(s: Sizes, devices: int, slices: int) -> Iterator[tuple[int, int, int]]:
    for tensor in (1, 2, 4, 8):
        if devices // slices % tensor or s.kv_heads % tensor:
            continue
        rest = devices // slices // tensor
        for copies in (1, 2, 4, 8):
            if rest % copies == 0:
                yield slices * copies, rest // copies, tensor


def memory_of(one: Candidate, s: Sizes, scale: float = 1.0) -> float:
    """Bytes of each device, estimated; scaled by the compiled step where there is one."""
    split = one.fsdp * one.tensor
    temporary = _temporary(one, s, scale)
    if s.estimated:
        temporary *= s.temporary / s.estimated
    return (s.state + s.frozen) / split + temporary


def _temporary(one: Candidate, s: Sizes, scale: float) -> float:
    tokens = scale * s.batch / s.minibatches / (one.data * one.fsdp) / one.accumulation * s.length
    gradients = 4 * s.params / (one.fsdp * one.tensor) * (2 if one.accumulation > 1 else 1)
    a_layer = s.embed * s.head_dim * (2 * s.heads + 2 * s.kv_heads) + s.mlp_matrices * s.embed * s.mlp
    gathered = 2 * (2 * a_layer + 2 * s.vocab * s.embed) / one.tensor
    wide = (s.head_dim * (2 * s.heads + 2 * s.kv_heads) + (s.mlp_matrices - 1) * s.mlp) / one.tensor
    narrow = 2 * s.embed + s.head_dim * (2 * s.heads + 2 * s.kv_heads) / one.tensor
    kept = {"full": s.embed, "attention": narrow, "dots": 2 * s.embed + wide, "none": 5 * s.embed + 2.5 * wide}[
        one.remat
    ]
    return gradients + gathered + 2 * tokens * (s.layers * kept + 3 * wide + 8 * s.embed)


def bandwidths(shape: tuple[int, int, int], devices: Sequence[Any], assumed: Assumptions) -> dict[str, float]:
    """Bytes/s of the slowest ring along each axis of a mesh."""
    order = list(make_mesh(dict(zip(AXES, shape, strict=True)), devices).devices.flat) if len(devices) else []
    numbers = np.arange(np.prod(shape)).reshape(shape)
    found = {}
    for i, axis in enumerate(AXES):
        groups = np.moveaxis(numbers, i, -1).reshape(-1, shape[i]).tolist()
        found[axis] = min(link(group, assumed, order).bandwidth for group in groups[:64])
    return found


def seconds_of(one: Candidate, s: Sizes, scale: float, assumed: Assumptions, bandwidth: Mapping[str, float]) -> float:
    """Seconds of a token of each device, estimated: products, gathers of weights, sums over `tensor`, the optimizer."""
    v = assumed.values
    tokens = scale * s.batch / s.minibatches * s.length
    again = {"full": 1.0, "attention": 0.65, "dots": 0.1, "none": 0.0}[one.remat]
    devices = one.data * one.fsdp * one.tensor
    numbers = s.params + s.resting
    products = 2 * numbers * (s.passes + again) * tokens / devices / (v["flops"] * v["efficiency"])
    reach = {axis: each * v["link_efficiency"] for axis, each in bandwidth.items()}
    gathers = 2 * numbers / one.tensor * 3 * one.accumulation * (1 - 1 / one.fsdp) / reach["fsdp"]
    copies = 4 * s.params / (one.fsdp * one.tensor) * 2 * (1 - 1 / one.data) / reach["data"]
    sums = 6 * s.layers * 2 * s.embed * tokens / (one.data * one.fsdp) * 2 * (1 - 1 / one.tensor) / reach["tensor"]
    memory = v["bandwidth"] * v["memory_efficiency"]
    update = (2 * s.state + 8 * s.params * one.accumulation) / (one.fsdp * one.tensor) / memory
    hidden = min(0.7 * gathers, 0.8 * products)
    return (products + gathers - hidden + copies + sums + update) / tokens


def configured(config: Any, devices: int, remat: str = "") -> Candidate:
    """What a configuration says itself, nothing estimated.

    Args:
      config: one stage's.
      devices: how many.
      remat: the policy that `model.remat=auto` was settled to.
    """
    data, fsdp, tensor = mesh_shape(config.mesh, devices)
    return Candidate(
        data, fsdp, tensor, remat or config.model.remat, config.grad_accum_steps, config.batch_size, 0.0, 0.0
    )


def applied(config: Any, one: Candidate) -> Any:
    """The configuration with a candidate's fields."""
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.mesh.data, c.mesh.fsdp, c.mesh.tensor = one.data, one.fsdp, one.tensor
        c.model.remat, c.grad_accum_steps, c.batch_size = one.remat, one.accumulation, one.batch
    return c


def search(
    config: Any,
    devices: list[Any],
    assumed: Assumptions,
    most: int,
    say: Callable[[str], None],
    planned: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compiles the train step of the candidates that are estimated to be the fastest.

    Args:
      config: one stage's.
      devices: of the machine.
      assumed: the machine and the numbers of the prediction.
      most: how many are compiled.
      say: is told of what is compiled.
      planned: the stage as it is configured, which is not compiled again.

    Returns:
      `estimated` and `compiled`, how many, and `found`: `lines`, `seconds` of a step, `tokens_per_second`, `mfu`,
      `peak`, the fastest first; behind them those of another batch, `changes_optimisation`.
    """
    s, slices = _sizes(config, devices, assumed)
    ranked = candidates(s, config, len(devices), slices, assumed, devices)
    now, found, compiled = _now(config, len(devices), planned), [], 0
    # The least estimate of what did not fit, by mesh and remat. Estimates are off by a share that is a mesh's own: what
    # one mesh cannot hold condemns another only where that is estimated to need `_SLACK` times as much.
    too_much: dict[tuple[Any, ...], float] = {}
    others = any(one.batch != config.batch_size for one in ranked)
    shares = {True: most - most // 3 if others else most, False: most // 3}
    for one in _varied(ranked):
        same = one.batch == config.batch_size
        known = one[:6] == now[:6] and planned is not None
        elsewhere = min((b for key, b in too_much.items() if key[3] == one.remat), default=math.inf)
        hopeless = one.memory >= min(too_much.get(one[:4], math.inf), _SLACK * elsewhere)
        if hopeless or not (shares[same] or known):
            continue
        try:
            if known:
                there = planned or {}
            else:
                compiled, shares[same] = compiled + 1, shares[same] - 1
                say(f"compiling train step {compiled} of at most {most}: {one.lines(now)}")
                there = plan_stage(applied(config, one), devices, assumed, lambda text: None, only="train step")
            step = _step(there)
        except InputError as error:  # of memory, or of what training refuses of this one
            say(f"  not this one: {error.problem}")
            step = None
            if "out of memory" not in error.problem:
                continue
        if step is None or not step["fits"]:
            too_much[one[:4]] = min(one.memory, too_much.get(one[:4], math.inf))
            if step is not None and not known:
                say(f"  does not fit: {step['memory']['peak'] / 2**30:.1f} GiB")
            continue
        seconds = step["seconds"]["total"]
        speed = there["iteration"]["tokens"] / (seconds * s.minibatches)
        found.append(
            {
                "lines": one.lines(now),
                "changes_optimisation": not same,
                "seconds": seconds,
                "tokens_per_second": speed,
                "mfu": step["mfu"],
                "peak": step["memory"]["peak"],
            }
        )
        if not known:
            say(f"  {speed:,.0f} tokens/s, {step['memory']['peak'] / 2**30:.1f} GiB")
    found.sort(key=lambda each: (each["changes_optimisation"], -each["tokens_per_second"]))
    return {"estimated": len(ranked), "compiled": compiled, "found": found}


def _now(config: Any, devices: int, planned: Mapping[str, Any] | None) -> Candidate:
    """The configured candidate, `model.remat=auto` as it was settled."""
    settled = str((planned or {}).get("settings", {}).get("remat", ""))
    return configured(config, devices, settled.removeprefix("auto: "))


def _step(planned: Mapping[str, Any]) -> dict[str, Any] | None:
    """The train step among a stage's programs; None where the compiler found no room for it."""
    return next((p for p in planned["programs"] if p["name"] == "train step"), None)


def _varied(ranked: list[Candidate]) -> Iterator[Candidate]:
    """The fastest first, but no more than two in a row that differ in accumulation or batch alone."""
    later, seen = [], {}
    for one in ranked:
        key = (one.data, one.fsdp, one.tensor, one.remat)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 2:
            later.append(one)
        else:
            yield one
    yield from later


def _sizes(config: Any, devices: list[Any], assumed: Assumptions) -> tuple[Sizes, int]:
    """Sizes of the stage, whatever its mesh and batch divide."""
    import tempfile

    from jaxalign.plan.stages import make_stage

    slices = len({getattr(d, "slice_index", 0) for d in devices})
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.grad_accum_steps = slices, -1, 1, 1
        parts = len(devices) * c.algorithm.get("num_minibatches", 1)
        c.batch_size = -(-c.batch_size // parts) * parts
    with tempfile.TemporaryDirectory() as scratch:
        sizes = sizes_of(make_stage(c, devices, scratch, assumed.values)[0])
    return sizes._replace(batch=sizes.batch * config.batch_size // c.batch_size), slices


def nothing_fits(s: Sizes, devices: int, assumed: Assumptions) -> InputError:
    """The error where no candidate fits: how many devices would do."""
    pool = assumed.machine.memory * assumed.values["pool"]
    held = s.state + s.frozen + 4 * s.params
    count = 1 << math.ceil(math.log2(max(held / (0.7 * pool), devices + 1)))
    return InputError(
        f"parameters, optimizer, gradients and frozen models take {held / devices / 2**30:.1f} GiB on each of "
        f"{devices} devices, whichever way they are split, and programs may use {pool / 2**30:.1f}",
        "what fits",
        f"about {count} such devices, or --config.optimizer.state_dtype=bfloat16"
        + (", or --config.model.frozen_dtype=bfloat16" if s.frozen else ""),
    )


def nearest_that_fits(config: Any, devices: list[Any], assumed: Assumptions, planned: dict[str, Any]) -> str:
    """The lines of the fastest candidate that is estimated to fit, of the same batch; what to change, where none is.

    Args:
      config: one stage's, whose train step does not fit.
      devices: of the machine.
      assumed: the machine and the numbers of the prediction.
      planned: the stage as it was planned; without programs where it did not compile.
    """
    from jaxalign.train.compiled import ADVICE

    s, slices = _sizes(config, devices, assumed)
    now, step = _now(config, len(devices), planned), _step(planned)
    if step and now.remat in _REMAT:
        s = s._replace(temporary=step["memory"]["temporary"], estimated=_temporary(now, s, 1.0))
    pool = assumed.machine.memory * assumed.values["pool"]
    ranked = candidates(s, config, len(devices), slices, assumed, devices)
    fits = [one for one in ranked if one.memory <= 0.95 * pool and one.batch == config.batch_size]
    if other := [one for one in fits if one[:6] != now[:6]]:
        return other[0].lines(now)
    return ADVICE if ranked else nothing_fits(s, len(devices), assumed).fix

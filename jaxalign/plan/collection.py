"""The programs that collect PPO's experience, in the order in which an iteration runs them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxalign.models import stacks
from jaxalign.models.schedule import cache_arrays
from jaxalign.models.transformer import Model
from jaxalign.parallel.device_memory import device_bytes
from jaxalign.parallel.sharding import batch_sharding, replicated
from jaxalign.rewards.model import ModelScorer, score_rows
from jaxalign.rollout import layout, slots
from jaxalign.rollout.completed import Rollout
from jaxalign.rollout.driver import MOST_STEPS, cache_widths
from jaxalign.rollout.pairs import last_columns
from jaxalign.rollout.sampling import Sampling
from jaxalign.rollout.sizes import cache_width, power_of_two
from jaxalign.types import CausalByIndex, Rows


class Call(NamedTuple):
    """A function, compiled, and what it was compiled for."""

    name: str
    executable: Any
    arguments: Any
    results: Any  # shapes and shardings
    times: float = 1.0  # in an iteration


def compiled(name: str, on: Mesh, function: Any, *args: Any, **static: Any) -> Call:
    """Compiles a jitted function for arguments of these shapes; its results are described with their shardings."""
    with jax.set_mesh(on):
        lowered = function.lower(*args, **static)
        executable = lowered.compile()
    results = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), lowered.out_info, executable.output_shardings
    )
    return Call(name, executable, args, results)


def collection(stage: Any, params: Any, frozen: Any, batch: Any, limit: int | None = None) -> Iterator[Call]:
    """The programs of one iteration's collection, under the stage's mesh.

    Args:
      stage: of PPO.
      params: shapes by role: of the whole models that are trained, frozen parameters among them.
      frozen: shapes by role.
      batch: shapes of a batch of prompts.
      limit: bytes of a device that programs may use.
    """
    c, mesh, collector = stage.config, stage.mesh, stage.program.prepare.collector
    policy, rows, sampling = collector.policy, batch_sharding(mesh), collector.sampling
    with jax.set_mesh(mesh):
        asked, _ = jax.eval_shape(collector.ask, batch)
    asked = _with(asked, rows)
    prefilled = compiled("prefill", mesh, slots.prefill, policy, params["policy"], batch.rows)
    yield prefilled
    num_slots = min(c.rollout.num_slots or len(asked.record_ids), len(asked.record_ids))
    widest = cache_width(batch.rows.tokens.shape[1] + sampling.max_new_tokens)
    held = device_bytes((stage.like.params, () if stage.offload else (stage.like.opt, frozen)))
    collector.limit = limit
    split = collector.split(batch.rows.tokens.shape, held)
    place = layout.Place(mesh, layout.decoding_mesh(mesh, split.tensor))
    if place.decoding is not mesh:
        yield compiled("prompts to decoding", place.decoding, slots.by_slots, place.there(prefilled.results))
    laid = yield from _lay_out(policy, place.there(params["policy"]), place)
    total, wide = len(asked.record_ids), c.rollout.max_new_tokens
    widths = [(widest, wide)] if num_slots < total else cache_widths(batch.rows.tokens.shape[1], wide)
    yield from _decode(collector, laid, place, sampling, num_slots, widths)

    def of_completions(dtype: Any, *dims: int, count: int = total) -> Any:
        return jax.ShapeDtypeStruct((count, *dims), dtype, sharding=rows)

    here = of_completions(np.bool_, wide)
    rollout = Rollout(
        of_completions(np.int32, wide), here, here, of_completions(np.float32, wide), of_completions(np.bool_)
    )
    with jax.set_mesh(mesh):
        given, readouts = _with(jax.eval_shape(collector.complete, asked.rows, rollout), rows)
    if isinstance(collector.reward, (Model, ModelScorer)):
        brought = device_bytes(frozen["reward"]) if stage.offload else 0  # from the host's memory
        parts = collector.scored_in(given, held + brought)
    if isinstance(collector.reward, Model):
        last = jax.eval_shape(lambda a, b: last_columns(a, b, collector.together), asked.rows, here)
        yield compiled("scoring", mesh, collector.score, frozen["reward"], given, _with(last, rows), parts=parts)
    elif isinstance(collector.reward, ModelScorer):
        width, at_once = power_of_two(given.tokens.shape[1]), total // parts
        text = Rows(*[of_completions(np.int32, width, count=at_once)] * 4)._replace(causal=CausalByIndex())
        last = of_completions(np.int32, count=at_once)
        made = compiled("scoring", mesh, score_rows, collector.reward.model, frozen["reward"], text, last)
        yield made._replace(times=float(parts))
    own = {role: params[role] for role in collector.roles}
    brought = device_bytes(frozen["ref"]) if stage.offload else 0
    yield compiled(
        "forward passes",
        mesh,
        collector.forward,
        own,
        frozen["ref"],
        given,
        readouts,
        parts=collector.parts_of(given, held + brought),
    )


def _lay_out(policy: Model, params: Any, place: Any) -> Generator[Call, None, Any]:
    """The rollout's layout of the weights: a program for each layer, the same one."""
    ends = {name: part for name, part in params.items() if name != "layers"}
    with jax.set_mesh(place.decoding):
        arrays = cache_arrays(policy.config.num_layers)
    first = compiled("layout: embed, head", place.decoding, layout.lay_out_ends, policy, ends, mesh=place.mesh)
    yield first
    number = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(place.decoding))
    static, layers = {"arrays": arrays, "mesh": place.mesh}, params["layers"]
    if policy.config.cuts is not None:  # each array's layers are brought together first
        static["arrays"], layers = 1, stacks.shapes_of(layers, policy.config.num_layers // arrays)
    layer = compiled("layout: a layer", place.decoding, layout.lay_out_layer, policy, layers, number, **static)
    yield layer._replace(times=float(arrays))
    # Each layer's arrays are its own: `device_bytes` counts an object once.
    own = tuple(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), layer.results)
                for _ in range(arrays))  # fmt: skip
    return first.results | {"layers": own}


def _decode(
    collector: Any, laid: Any, place: Any, sampling: Sampling, num_slots: int, widths: list[tuple[int, int]]
) -> Iterator[Call]:
    """Decoding of a token of all slots, from the widest cache and, where it grows, from the narrowest.

    Bytes and FLOPs rise with the width: the two run so often that the mean of their widths is that of all tokens.
    """
    (least, _), (most, _) = widths[0], widths[-1]
    tokens = sum(n for _, n in widths)
    wide = sum(n * (width - least) for width, n in widths) / max(most - least, 1)
    if most == least:
        yield _decode_from(collector, laid, place, sampling, num_slots, most)._replace(times=float(tokens))
        return
    yield _decode_from(collector, laid, place, sampling, num_slots, most)._replace(times=wide)
    narrow = _decode_from(collector, laid, place, sampling, num_slots, least)
    yield narrow._replace(name=f"decode, {least} columns", times=tokens - wide)


def _decode_from(collector: Any, laid: Any, place: Any, sampling: Sampling, num_slots: int, width: int) -> Call:
    """One program of decoding: of all slots, and a cache of so many columns."""
    mesh, batch = place.decoding, place.slots(num_slots)
    static = {"batch": batch, "width": width, "arrays": len(laid["layers"])}
    empty = compiled("slots", mesh, slots.empty_slots, collector.policy, np.int32(0), **static).results
    length = min(sampling.max_new_tokens, MOST_STEPS)
    draws = compiled("draws", mesh, slots.empty_draws, batch=batch, length=length, dtype=jnp.float32).results
    whole = replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    options = {"sampling": sampling, "stop_ids": collector.stop_ids}
    return compiled(
        f"decode (tensor={place.tensor})", mesh, slots.advance, collector.policy, laid, empty, draws, key, number,
        number, **options,
    )  # fmt: skip


def _with(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

"""The programs that collect PPO's experience, in the order in which an iteration runs them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxalign.models.schedule import cache_arrays
from jaxalign.models.transformer import Model
from jaxalign.parallel.sharding import batch_sharding, replicated
from jaxalign.rewards.model import ModelScorer, score_rows
from jaxalign.rollout import slots
from jaxalign.rollout.completed import Rollout
from jaxalign.rollout.driver import _MOST_STEPS, whole_shards
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


def compiled(name: str, function: Any, *args: Any, **static: Any) -> Call:
    """Compiles a jitted function for arguments of these shapes; its results are described with their shardings."""
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
      params: shapes by role: those that are trained.
      frozen: shapes by role.
      batch: shapes of a batch of prompts.
      limit: bytes of a device that programs may use.
    """
    c, mesh, collector = stage.config, stage.mesh, stage.program.prepare.collector
    policy, rows = collector.policy, batch_sharding(mesh)
    asked, _ = jax.eval_shape(collector.ask, batch)
    asked = _with(asked, rows)
    laid_out = yield from _lay_out(policy, params["policy"], limit)
    prefilled = compiled("prefill", slots.prefill, policy, params["policy"], batch.rows)
    yield prefilled
    yield from _decode(collector, laid_out, prefilled.results, asked, mesh)
    total, wide = len(asked.record_ids), c.rollout.max_new_tokens

    def of_completions(dtype: Any, *dims: int) -> Any:
        return jax.ShapeDtypeStruct((total, *dims), dtype, sharding=rows)

    here = of_completions(np.bool_, wide)
    rollout = Rollout(
        of_completions(np.int32, wide), here, here, of_completions(np.float32, wide), of_completions(np.bool_)
    )
    given, readouts = _with(jax.eval_shape(collector.complete, asked.rows, rollout), rows)
    if isinstance(collector.reward, Model):
        last = jax.eval_shape(lambda a, b: last_columns(a, b, collector.together), asked.rows, here)
        yield compiled("scoring", collector.score, frozen["reward"], given, _with(last, rows))
    elif isinstance(collector.reward, ModelScorer):
        width = power_of_two(given.tokens.shape[1])
        text = Rows(*[of_completions(np.int32, width)] * 4)._replace(causal=CausalByIndex())
        yield compiled("scoring", score_rows, collector.reward.model, frozen["reward"], text, of_completions(np.int32))
    own = {role: params[role] for role in collector.roles}
    yield compiled("forward passes", collector.forward, own, frozen["ref"], given, readouts)


def _lay_out(policy: Model, params: Any, limit: int | None) -> Generator[Call, None, Any]:
    """The rollout's layout of the weights, whole where training would have them whole."""
    arrays = cache_arrays(policy.config.num_layers)
    mesh = jax.sharding.get_abstract_mesh()
    size = sum(x.size for x in jax.tree.leaves(params)) * jnp.dtype(policy.config.dtype).itemsize
    whole = limit is None or size / mesh.shape["tensor"] <= limit / 4
    call = compiled("layout", slots._lay_out, policy, params, whole=whole, arrays=arrays)
    yield call._replace(name=f"layout ({'whole' if whole else 'split'} weights)")
    return call.results


def _decode(collector: Any, laid: Any, prefilled: Any, asked: Any, mesh: Any) -> Iterator[Call]:
    """One program of decoding: of all slots, and a cache as wide as it becomes."""
    c, sampling = collector.config, Sampling.of(collector.config.rollout)
    total = len(asked.record_ids)
    num_slots = whole_shards(min(c.rollout.num_slots or total, total), mesh)
    arrays, width = len(laid["layers"]), cache_width(prefilled.keys.shape[3] + sampling.max_new_tokens)
    static = {"batch": num_slots, "width": width, "arrays": arrays}
    empty = compiled("slots", slots.empty_slots, collector.policy, np.int32(0), **static).results
    length = min(sampling.max_new_tokens, _MOST_STEPS)
    draws = compiled("draws", slots.empty_draws, batch=num_slots, length=length, dtype=jnp.float32).results
    whole = replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    options = {"sampling": sampling, "stop_ids": collector.stop_ids}
    yield compiled("decode", slots.advance, collector.policy, laid, empty, draws, key, number, number, **options)


def _with(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

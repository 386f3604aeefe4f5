"""Attention kernels under a mesh: the compiler cannot split a kernel, so each device calls it on its rows and heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def on_each_device(kernel: Callable[..., jax.Array], q_BTNH, k_BSKH, v_BSKH, *of_tokens: Any) -> jax.Array:
    """`kernel(q, k, v, *of_tokens)` inside a `shard_map` over the ambient mesh: rows over `data` and `fsdp`, heads over
    `tensor`; without a mesh, or inside another `shard_map`, the call itself.

    Rows or heads that their axes do not divide stay whole.  Fewer key heads than `tensor` are repeated, so that each
    device holds the ones that its queries read.

    Args:
      kernel: of all heads and rows, or of some.
      q_BTNH: [B, T, N, H].
      k_BSKH: [B, S, K, H].
      v_BSKH: [B, S, K, H].
      of_tokens: trees of arrays [B, T] or [B, S].
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = any(t == jax.sharding.AxisType.Manual for t in mesh.axis_types)
    sizes = {} if mesh.empty or manual else {axis: n for axis, n in mesh.shape.items() if n > 1}
    if not sizes:
        return kernel(q_BTNH, k_BSKH, v_BSKH, *of_tokens)
    rows = tuple(axis for axis in ("data", "fsdp") if axis in sizes)
    if q_BTNH.shape[0] % math.prod(sizes[axis] for axis in rows):
        rows = ()
    tensor = sizes.get("tensor", 1)
    repeats = math.lcm(k_BSKH.shape[2], tensor) // k_BSKH.shape[2]
    heads = "tensor" if tensor > 1 and q_BTNH.shape[2] % (k_BSKH.shape[2] * repeats) == 0 else None
    if heads and repeats > 1:
        k_BSKH, v_BSKH = (jnp.repeat(x, repeats, axis=2) for x in (k_BSKH, v_BSKH))
    of_heads, of_rows = P(rows, None, heads, None), P(rows, None)
    ins = (of_heads, of_heads, of_heads, *jax.tree.map(lambda _: of_rows, of_tokens))
    shards = jax.shard_map(kernel, in_specs=ins, out_specs=of_heads, check_vma=False)
    return shards(q_BTNH, k_BSKH, v_BSKH, *of_tokens)

"""Work as wide as the vocabulary: how it is split over the mesh, and into chunks of which no device holds too much."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxalign.ops.platform import platform
from jaxalign.ops.precision import product_precision


class VocabularyShards:
    """How the vocabulary work is split over the ambient mesh, and the collectives that this takes.

    Rows are split over `data` and `fsdp`, the head arrives as [D / fsdp, V / tensor].  A dim that its axis does not
    divide stays whole; without a mesh, or where the rows do not divide, everything is left to the compiler.
    """

    def __init__(self, taken_shape: tuple[int, ...], head_shape: tuple[int, ...]):
        mesh = jax.sharding.get_abstract_mesh()
        manual = any(t == jax.sharding.AxisType.Manual for t in mesh.axis_types)
        sizes = {} if mesh.empty or manual else {a: n for a, n in mesh.shape.items() if n > 1}
        self.batch = tuple(a for a in ("data", "fsdp") if a in sizes)
        if taken_shape[0] % math.prod(sizes[a] for a in self.batch):
            sizes, self.batch = {}, ()
        self.split = bool(self.batch) or "tensor" in sizes
        self.own = self.split or mesh.empty or mesh.size == 1  # whether a device sees its own part of arrays
        self.fsdp = "fsdp" if "fsdp" in sizes and head_shape[0] % sizes["fsdp"] == 0 else None
        self.tensor = "tensor" if "tensor" in sizes and head_shape[1] % sizes["tensor"] == 0 else None
        rows, self.length, _ = taken_shape
        # Of a row of readouts, the logits that a device holds.
        self.column = rows // math.prod(sizes[a] for a in self.batch) * head_shape[1] // sizes.get(self.tensor, 1)

    def chunk_length(self, max_logits: int) -> int:
        """Equal chunks of M, as long as the logits of a chunk allow on a device."""
        if not self.length:
            return 0
        count = math.ceil(self.length / max(1, max_logits // max(1, self.column)))
        return math.ceil(self.length / count)

    def run(self, local, ins: tuple[str, ...], outs: tuple[str, ...]):
        """`local` over the shards, its arguments and results each "rows" [B, ...], "logits" [B, M, V] or "head"."""
        if not self.split:
            return local
        named = {
            "rows": P(self.batch),
            "logits": P(self.batch, None, self.tensor),
            "head": P(self.fsdp, self.tensor),
        }
        specs = [tuple(named[name] for name in names) for names in (ins, outs)]
        return jax.shard_map(local, in_specs=specs[0], out_specs=specs[1], check_vma=False)

    def gather_head(self, head):
        return jax.lax.all_gather(head, self.fsdp, axis=0, tiled=True) if self.fsdp else head

    def scatter_head(self, d_head):
        """The transpose of `gather_head`, summed over the rows' shards."""
        others = tuple(a for a in self.batch if a != self.fsdp)
        if self.fsdp:
            d_head = jax.lax.psum_scatter(d_head, self.fsdp, scatter_dimension=0, tiled=True)
        return jax.lax.psum(d_head, others) if others else d_head

    def of_logits(self, z, target, entropy):
        """Log-probs of the targets, log-sum-exp, and entropies where they are asked for, of logits [B, M, V]."""
        top = self.max_over_vocabulary(jnp.max(z, axis=-1))
        e = jnp.exp(z - top[..., None])
        total = self.sum_over_vocabulary(jnp.sum(e, axis=-1))
        lse = top + jnp.log(total)
        logprob = self.sum_over_vocabulary(self.of_target(z, target)) - lse
        if not entropy:
            return logprob, lse
        # H = lse - sum p z, with z measured from its maximum so that nothing large cancels
        mean = self.sum_over_vocabulary(jnp.sum(e * (z - top[..., None]), axis=-1)) / total
        return logprob, lse, jnp.log(total) - mean

    def of_products(self, d_z, h, head):
        """The gradients of hidden states and of the head that those of the logits make."""
        d_z = d_z.astype(h.dtype)  # matmuls in the compute dtype, accumulated in float32
        d_h = self.sum_over_vocabulary(_matmul(d_z, head, (((2,), (1,)), ((), ())))).astype(h.dtype)
        return d_h, _matmul(h, d_z, (((0, 1), (0, 1)), ((), ())))

    def of_target(self, z, target):
        """The number of `z` [B, M, V] at each target, 0 where that is of another shard.

        A GPU would read all of `z` once more to compare; it gathers, where the array is a device's own.
        """
        width = z.shape[-1]
        if platform() != "gpu" or not self.own:
            return jnp.sum(jnp.where(hits(target, width, 0), z, 0), axis=-1)
        found = jnp.take_along_axis(z, target[..., None], axis=-1, mode="clip")[..., 0]
        return jnp.where((target >= 0) & (target < width), found, 0)

    def vocabulary_offset(self, head):
        return jax.lax.axis_index(self.tensor) * head.shape[1] if self.tensor else 0

    def sum_over_vocabulary(self, x):
        return jax.lax.psum(x, self.tensor) if self.tensor else x

    def max_over_vocabulary(self, x):
        return jax.lax.pmax(x, self.tensor) if self.tensor else x


def _matmul(a, b, dims):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, dims, precision=product_precision(a.dtype), preferred_element_type=wide)


def hits(target, width, offset):
    """Where the vocabulary index is the target's: a comparison, which unlike a gather stays within a shard."""
    return jax.lax.broadcasted_iota(jnp.int32, (*target.shape, width), 2) + offset == target[..., None]


def over_chunks(fn, carry, arrays, length):
    """`fn(carry, chunk of arrays) -> (carry, outputs)` along dim 1 of the arrays; one call where one chunk will do."""
    m = arrays[0].shape[1]
    if length >= m:
        return fn(carry, arrays)
    count = math.ceil(m / length)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, count * length - m)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, length, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * length, *x.shape[3:])[:, :m]

    carry, outputs = jax.lax.scan(fn, carry, jax.tree.map(cut, arrays))
    return carry, jax.tree.map(join, outputs)

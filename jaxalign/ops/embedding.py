"""Token vectors: a lookup that moves vectors, not the table, and whose gradient is summed in at least float32."""

from __future__ import annotations

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
    """The row of each token in a table, in the compute dtype.

    A frequent token's gradient is a sum of thousands of terms: it is added up in at least float32, whatever the compute
    dtype.  Under a mesh the table stays split as it is stored, [V / tensor, D / fsdp], and so does its gradient: each
    device looks up its part of the vectors for the rows of all, and an all-to-all over `fsdp` brings the parts of a
    vector together.  That moves B T D numbers, where gathering the table moves V D of them, and as many for its
    gradient.

    Args:
      table_VD: [V, D], in the parameters' dtype.
      tokens_BT: int [B, T].
      dtype: of the vectors.

    Returns:
      [B, T, D]; NaN for a token past the vocabulary.

    >>> lookup(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1, 0]]), "bfloat16").tolist()
    [[[3.0, 4.0], [1.0, 2.0]]]
    """
    chex.assert_rank([table_VD, tokens_BT], 2)
    return _lookup(table_VD, tokens_BT, _Layout.of(table_VD, tokens_BT.shape[0], dtype))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the table and the rows are split over the ambient mesh.

    A dim that its axis does not divide stays whole; without a mesh, or where the rows do not divide, `batch` and
    `tensor` are empty and everything is left to the compiler.
    """

    vocab: int  # rows of the table that a device holds
    table_dtype: jnp.dtype
    dtype: jnp.dtype
    batch: tuple[str, ...]
    fsdp: str | None
    tensor: str | None

    @classmethod
    def of(cls, table_VD, rows: int, dtype) -> _Layout:
        mesh = jax.sharding.get_abstract_mesh()
        manual = any(t == jax.sharding.AxisType.Manual for t in mesh.axis_types)
        sizes = {} if mesh.empty or manual else {a: n for a, n in mesh.shape.items() if n > 1}
        batch = tuple(a for a in ("data", "fsdp") if a in sizes)
        if rows % math.prod(sizes[a] for a in batch):
            sizes, batch = {}, ()
        V, D = table_VD.shape
        fsdp = "fsdp" if "fsdp" in sizes and D % sizes["fsdp"] == 0 else None
        tensor = "tensor" if "tensor" in sizes and V % sizes["tensor"] == 0 else None
        return cls(V // sizes.get(tensor, 1), table_VD.dtype, jnp.dtype(dtype), batch, fsdp, tensor)

    def run(self, local, ins: tuple[P, ...], out: P):
        if not self.batch and not self.tensor:
            return local
        return jax.shard_map(local, in_specs=ins, out_specs=out, check_vma=False)

    @property
    def rows(self) -> P:
        return P(self.batch)

    @property
    def split(self) -> P:
        return P(self.tensor, self.fsdp)

    def index(self, tokens):
        """Of all rows along `fsdp`, the index of each token in this device's part of the vocabulary: past its end by 0
        where the token is of another part, by 1 where it is of none."""
        if self.fsdp:
            tokens = jax.lax.all_gather(tokens, self.fsdp, axis=0, tiled=True)
        if not self.tensor:
            return tokens
        size = self.vocab * jax.lax.axis_size(self.tensor)
        tokens = jnp.where(tokens < 0, tokens + size, tokens)  # as `jnp.take` counts them
        index = tokens - jax.lax.axis_index(self.tensor) * self.vocab
        elsewhere = jnp.where((tokens >= 0) & (tokens < size), self.vocab, self.vocab + 1)
        return jnp.where((index >= 0) & (index < self.vocab), index, elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table, tokens, layout: _Layout):
    return _forward(table, tokens, layout)[0]


def _forward(table, tokens, layout):
    def local(table, tokens):
        index = layout.index(tokens)
        if layout.tensor:
            x, index = jnp.take(table, index, axis=0, mode="clip"), index[..., None]
            other = jnp.where(index > layout.vocab, jnp.nan, 0.0).astype(x.dtype)
            x = jnp.where(index < layout.vocab, x, other).astype(layout.dtype)
            x = jax.lax.psum(x, layout.tensor)  # all but one are 0
        else:
            x = jnp.take(table, index, axis=0).astype(layout.dtype)
        return jax.lax.all_to_all(x, layout.fsdp, 0, 2, tiled=True) if layout.fsdp else x

    return layout.run(local, (layout.split, layout.rows), layout.rows)(table, tokens), tokens


def _backward(layout, tokens, d_x):
    def local(d_x, tokens):
        if layout.fsdp:
            d_x = jax.lax.all_to_all(d_x, layout.fsdp, 2, 0, tiled=True)
        d_table = _summed(layout.index(tokens), d_x, layout.vocab)
        others = tuple(a for a in layout.batch if a != layout.fsdp)
        return (jax.lax.psum(d_table, others) if others else d_table).astype(layout.table_dtype)

    return layout.run(local, (layout.rows, layout.rows), layout.split)(d_x, tokens), None


_lookup.defvjp(_forward, _backward)


def _summed(index, terms, size: int):
    """The terms [B, T, D] of each index, added up: [size, D] in at least float32, in which they take no more memory at
    a time than their sum."""
    total = jnp.zeros((size, terms.shape[-1]), jnp.promote_types(terms.dtype, jnp.float32))

    def add(total, given):
        index, terms = given
        return total.at[index].add(terms.astype(total.dtype), mode="drop"), None

    rows, length = index.shape
    if terms.dtype == total.dtype or rows * length <= size:
        return add(total, (index, terms))[0]
    a_time = max([n for n in range(1, rows) if rows % n == 0 and n * length <= size], default=1)
    cut = jax.tree.map(lambda x: x.reshape(-1, a_time, *x.shape[1:]), (index, terms))
    return jax.lax.scan(add, total, cut)[0]

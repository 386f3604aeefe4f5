"""Logits from hidden states: the one product with the vocabulary, for readouts and for decoding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxalign.ops.attention_scores import Scores
from jaxalign.ops.precision import product_precision


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel"], meta_fields=["made"])
@dataclasses.dataclass(frozen=True)
class Head:
    """A token head whose logits are scaled or capped; where they are not, its matrix alone will do."""

    kernel: jax.Array  # [D, V]
    made: Scores | None  # scale and softcap; None: neither


def parts(head: jax.Array | Head) -> tuple[jax.Array, Scores | None]:
    """A head's matrix [D, V], and the scale and softcap of its logits; None: neither."""
    return (head.kernel, head.made) if isinstance(head, Head) else (head, None)


def logits(hidden: jax.Array, head: jax.Array | Head) -> jax.Array:
    """`z = hidden head`; of a `Head` `scale hidden head`, or `softcap tanh(scale hidden head / softcap)`.

    Args:
      hidden: [..., D], after the last norm.
      head: [D, V] of the same dtype.

    Returns:
      [..., V] in at least float32.

    >>> head = Head(jnp.eye(2), Scores(10.0, softcap=2.0))
    >>> print(logits(jnp.array([0.1, 5.0]), head).round(3), logits(jnp.array([0.1, 5.0]), head.kernel))
    [0.924 2.   ] [0.1 5. ]
    """
    kernel, made = parts(head)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    dims = (((hidden.ndim - 1,), (0,)), ((), ()))
    precision = product_precision(hidden.dtype)
    z = jax.lax.dot_general(hidden, kernel, dims, precision=precision, preferred_element_type=wide)
    return z if made is None else made.of(z)

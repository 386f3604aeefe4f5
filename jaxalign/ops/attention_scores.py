"""What is the same in every attention backend: how q . k becomes a score, and which keys a window leaves out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scores(NamedTuple):
    """How the product of a query and a key becomes a score: `softcap tanh(scale q . k / softcap)`, or `scale q . k`."""

    scale: float
    softcap: float | None = None

    def of(self, products: jax.Array) -> jax.Array:
        """Scores from q . k."""
        scores = products * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def slope(self, scores: jax.Array) -> jax.Array | None:
        """The cap's own derivative, `1 - (score / softcap)^2`; None without a cap."""
        return None if self.softcap is None else 1 - jnp.square(scores / self.softcap)


class Window(NamedTuple):
    """Which keys are near enough, beside those that the interval rules out."""

    least: jax.Array  # int [B, T], the first position that each query sees: its own less the window, plus 1
    positions: jax.Array  # int [B, S], of the keys


def sloped(d_scores: jax.Array, slope: jax.Array | None) -> jax.Array:
    """The gradient before the cap."""
    return d_scores if slope is None else d_scores * slope

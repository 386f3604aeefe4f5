"""Dynamic loss scaling, which keeps float16 gradients above underflow and below overflow."""

from __future__ import annotations

import jax
import jax.numpy as jnp


class LossScale:
    """The scale lives in `TrainState.extra`, so that a resumed run scales as the uninterrupted one.

    An overflow halves it and skips the update, which is no failure; `GROWTH_INTERVAL` good steps in a row double it
    (Micikevicius et al. 2018, section 3.2; the constants are those of torch's GradScaler).
    """

    INITIAL = 2.0**16
    SMALLEST = 1.0  # an overflow at this scale is a failure of the run, not of the scale
    LARGEST = 2.0**24
    GROWTH_INTERVAL = 2000

    @classmethod
    def initial(cls) -> dict[str, jax.Array]:
        """The entries of `extra` at the start of a run."""
        return {"loss_scale": jnp.float32(cls.INITIAL), "loss_scale_good_steps": jnp.int32(0)}

    @staticmethod
    def current(extra: dict[str, jax.Array]) -> jax.Array:
        return extra["loss_scale"]

    @classmethod
    def can_shrink(cls, extra: dict[str, jax.Array]) -> jax.Array:
        return extra["loss_scale"] > cls.SMALLEST

    @classmethod
    def updated(cls, extra, finite: jax.Array, overflow: jax.Array) -> dict[str, jax.Array]:
        """The entries after a step whose gradients were finite, or overflowed."""
        scale, good = extra["loss_scale"], jnp.where(finite, extra["loss_scale_good_steps"] + 1, 0)
        grow = good >= cls.GROWTH_INTERVAL
        scale = jnp.where(overflow, jnp.maximum(scale / 2, cls.SMALLEST), scale)
        scale = jnp.where(grow, jnp.minimum(scale * 2, cls.LARGEST), scale)
        return {"loss_scale": scale, "loss_scale_good_steps": jnp.where(grow, 0, good)}

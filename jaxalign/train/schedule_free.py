"""Schedule-Free AdamW: gradients are taken at y, and the average x is what is evaluated, sampled and exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxalign.parallel.host_memory import DEVICE, in_memory
from jaxalign.types import Params, TrainState


def schedule_free_adamw(
    schedule: Callable[[Any], jax.Array], b1: float, b2: float, eps: float, decay: list[optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Averaging in the place of a learning rate that falls.

        y_t = (1 - b1) z_t + b1 x_t                      the trained parameters, where the gradient g_t is taken
        z_{t+1} = z_t - lr_t (g_t / (sqrt(v_t / (1 - b2^t)) + eps) + weight_decay y_t)
        x_{t+1} = (1 - c_t) x_t + c_t z_{t+1},           c_t = lr_t^2 / sum_{i <= t} lr_i^2

    Source: Defazio et al. 2024 (arXiv 2405.15682, algorithm 1), with Adam's bias correction in v. The state is
    optax's and holds z and v; x follows from y and z, see `evaluated`.

    Args:
      schedule: of the learning rate, from the updates made: a warmup, then constant.
      b1: the share of x in y; 0.5 or more.
      b2: decay of v.
      eps: added to the root of v.
      decay: what adds the weight decay; empty for none.
    """
    base = optax.chain(
        optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
        *decay,
        optax.scale_by_schedule(lambda count: -schedule(count)),
    )
    init = contrib.schedule_free(base, 0.0, b1=b1).init

    def update(grads, state, params=None, **extra):
        # optax counts these steps from 1 and those of the base from 0: both are to see one learning rate.
        rate = jnp.maximum(state.max_lr, jnp.asarray(schedule(state.step_count - 1), state.max_lr.dtype))
        total = state.weight_sum + rate**2
        c = jnp.where(total > 0, rate**2 / jnp.where(total > 0, total, 1), 0)
        moves, base_state = base.update(grads, state.base_optimizer_state, params, **extra)
        z = jax.tree.map(lambda z, move: (z + move).astype(z.dtype), state.z, moves)

        # By differences: forming x and y anew at every step, as optax does, rounds both to one side, which adds up.
        def of_leaf(y, old, new):
            moved, ahead = new - old, (y - old) / b1  # z_{t+1} - z_t, x_t - z_t
            return ((1 - b1) * moved + b1 * c * (moved - ahead)).astype(y.dtype)

        updates = jax.tree.map(of_leaf, params, state.z, z)
        count = optax.safe_increment(state.step_count)
        return updates, state._replace(
            weight_sum=total, step_count=count, max_lr=rate, base_optimizer_state=base_state, z=z
        )

    return optax.GradientTransformationExtraArgs(init, update)


def evaluated(state: TrainState) -> TrainState:
    """The state with the parameters that are evaluated, sampled from and exported: x; of other optimizers as it is.

    Args:
      state: a training state; stays as it is, x is a copy.
    """
    params = dict(state.params)
    for role, opt in state.opt.items():
        is_own = lambda x: isinstance(x, contrib.ScheduleFreeState)  # noqa: E731
        for own in filter(is_own, jax.tree.leaves(opt, is_leaf=is_own)):
            if own.b1 is not None:  # beside 8-bit moments lie their scales in the same structure
                params[role] = average(params[role], *in_memory((own.z, own.b1), DEVICE))
    return state._replace(params=params)


@jax.jit
def average(y: Params, z: Params, b1: Any) -> Params:
    """x = z + (y - z) / b1, in y's dtype.

    Args:
      y: the trained parameters.
      z: from the optimizer's state.
      b1: the share of x in y.
    """
    return jax.tree.map(lambda y, z: (z + (y - z) / b1).astype(y.dtype), y, z)


def saved_z(cfg: Mapping[str, Any], params: Params) -> Any:
    """Where z lies in a role's saved optimizer state: that structure with z's shapes, dtypes and shardings alone.

    Args:
      cfg: the `optimizer` section.
      params: shapes, dtypes and shardings of the role's parameters.
    """
    dtype = "float32" if cfg["state_dtype"] == "int8" else cfg["state_dtype"]
    z = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding), params)
    chain = [None] * bool(cfg["max_grad_norm"]) + [{"z": z}]  # clipping comes first
    return {"moments": chain} if cfg["state_dtype"] == "int8" else chain

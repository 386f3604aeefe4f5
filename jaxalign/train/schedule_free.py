"""Schedule-Free AdamW: gradients are taken at y, and the average x is what is evaluated, sampled and exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
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

    Source: Defazio et al. 2024 (arXiv 2405.15682, algorithm 1), with Adam's bias correction in v, as optax has it. The
    state holds z and v; x follows from y and z, see `evaluated`.

    Args:
      schedule: of the learning rate, from the updates made: a warmup, then constant.
      b1: the share of x in y; above 0.
      b2: decay of v.
      eps: added to the root of v.
      decay: what adds the weight decay; empty for none.
    """
    base = optax.chain(
        optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
        *decay,
        optax.scale_by_schedule(lambda count: -schedule(count)),
    )
    # optax counts the steps of the average from 1 and those of the base from 0: both are to see one learning rate.
    return contrib.schedule_free(base, lambda count: schedule(count - 1), b1=b1)


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
    """x = (y - (1 - b1) z) / b1, in y's dtype.

    Args:
      y: the trained parameters.
      z: from the optimizer's state.
      b1: the share of x in y.
    """
    x = contrib.schedule_free_eval_params(contrib.ScheduleFreeState(b1, None, None, None, None, z), y)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), x, y)


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

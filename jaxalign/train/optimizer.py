"""Optimizers and learning-rate schedules from the configuration, one per trained role."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.types import Params

Schedule = Callable[[Any], jax.Array]


def make_schedule(cfg: Any, learning_rate: float, num_steps: int) -> Schedule:
    """The learning rate as a function of the updates made so far.

    It rises linearly over `warmup_steps` (the first update already has 1 / warmup of it), then stays (`constant`)
    or falls along a line or half a cosine to `final_fraction` of the peak at `num_steps`.

    Args:
      cfg: the `optimizer` section.
      learning_rate: the peak.
      num_steps: updates of the whole run.

    >>> from jaxalign.config import defaults
    >>> cfg = defaults("dpo").unlock().optimizer
    >>> cfg.schedule, cfg.warmup_steps = "linear", 2
    >>> schedule = make_schedule(cfg, 1.0, 12)
    >>> [round(float(schedule(i)), 3) for i in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    warmup = cfg.warmup_steps
    length = max(num_steps - warmup, 1)
    end = cfg.final_fraction

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        done = jnp.clip((count - warmup) / length, 0.0, 1.0)
        fraction = {
            "constant": lambda: jnp.ones_like(done),
            "linear": lambda: 1.0 - (1.0 - end) * done,
            "cosine": lambda: end + (1.0 - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
        }[cfg.schedule]()
        if warmup:
            fraction = jnp.where(count < warmup, (count + 1.0) / warmup, fraction)
        return learning_rate * fraction

    return schedule


def make_optimizer(cfg: Any, learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """The gradient transformation of one role: clip by the role's global norm, scale, decay, learning rate.

    Weight decay is decoupled (Loshchilov and Hutter 2019): parameters shrink by learning rate x `weight_decay`.
    Under `lion` and `sgd`, `b1` is the momentum.  `adafactor` (Shazeer and Stern 2018) keeps factored second moments,
    clips each update to a root mean square of 1 and takes the learning rate as it stands (no parameter scaling).

    Args:
      cfg: the `optimizer` section.
      learning_rate: the role's peak.
      num_steps: updates of the whole run.
    """
    parts = []
    if cfg.max_grad_norm:
        parts.append(optax.clip_by_global_norm(cfg.max_grad_norm))
    if cfg.name == "adamw":
        parts.append(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps))
    elif cfg.name == "lion":
        parts.append(optax.scale_by_lion(cfg.b1, cfg.b2))
    elif cfg.name == "adafactor":
        parts += [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    elif cfg.name == "sgd":
        parts.append(optax.trace(cfg.b1))
    else:
        raise ValueError(cfg.name)
    if cfg.weight_decay:
        parts.append(optax.add_decayed_weights(cfg.weight_decay, decay_mask if cfg.decay_mask == "matrices" else None))
    parts.append(optax.scale_by_schedule(lambda count: -make_schedule(cfg, learning_rate, num_steps)(count)))
    return optax.chain(*parts)


def decay_mask(params: Params) -> Any:
    """True for matrices, by name: a stacked norm's scale `[L, D]` has two dims but is none.

    >>> decay_mask({"norm": {"scale": 0}, "lm_head": {"kernel": 0, "bias": 0}, "embed": {"embedding": 0}})
    {'embed': {'embedding': True}, 'lm_head': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def updates_made(opt_state: Any) -> jax.Array:
    """How many updates the optimizer has applied: its schedule's count, which skipped updates leave as it was."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(x)]
    return found[0].count

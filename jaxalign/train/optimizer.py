"""Optimizers and learning-rate schedules from the configuration, one per trained role."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.errors import InputError
from jaxalign.functions import is_name
from jaxalign.models.adapter import Adapter
from jaxalign.models.stacks import place
from jaxalign.ops.precision import at_least_float32
from jaxalign.ops.stochastic_rounding import rounding_bits
from jaxalign.ops.trees import by_path, path_pattern
from jaxalign.parallel.sharding import path_name
from jaxalign.steps.step import global_norm
from jaxalign.train.muon import scale_by_muon
from jaxalign.train.named_functions import own_optimizer, own_schedule
from jaxalign.train.quantised_moments import pack, unpack
from jaxalign.train.schedule_free import schedule_free_adamw
from jaxalign.types import Params

Schedule = Callable[[Any], jax.Array]


def make_schedule(cfg: Any, learning_rate: float, num_steps: int) -> Schedule:
    """The learning rate as a function of the updates made so far.

    Linear warmup over `warmup_steps` (the first update has 1 / warmup of the peak), then constant, or linear or cosine
    decay to `final_fraction` of the peak at `num_steps`; or the share of the peak that a function of the user's own
    returns, `schedule(step, num_steps)`.

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
    own = own_schedule(cfg.schedule) if is_name(cfg.schedule) else None

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        done = jnp.clip((count - warmup) / length, 0.0, 1.0)
        fraction = (
            jnp.asarray(own(count, num_steps), jnp.float32)
            if own
            else {
                "constant": lambda: jnp.ones_like(done),
                "linear": lambda: 1.0 - (1.0 - end) * done,
                "cosine": lambda: end + (1.0 - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
            }[cfg.schedule]()
        )
        if warmup:
            fraction = jnp.where(count < warmup, (count + 1.0) / warmup, fraction)
        return learning_rate * fraction

    return schedule


def make_optimizer(
    cfg: Any, learning_rate: float, num_steps: int, adapter: Adapter | None = None
) -> optax.GradientTransformation:
    """The gradient transformation of one role: clip by the role's global norm, scale, decay, learning rate.

    Weight decay is decoupled (Loshchilov and Hutter 2019): parameters shrink by learning rate x `weight_decay`.
    Under `lion` and `sgd`, `b1` is the momentum.  `adafactor` (Shazeer and Stern 2018) keeps factored second moments,
    clips each update to a root mean square of 1 and takes the learning rate as it stands (no parameter scaling).
    `muon` (Jordan et al. 2024) orthogonalises the layers' matrices, see `scale_by_muon`; the rest gets Adam.
    `schedule_free` (Defazio et al. 2024) averages instead of lowering the rate, see `schedule_free_adamw`. A name such
    as `file.py:function` is a function of the user's own, `optimizer(learning_rate)`, which gets the schedule. What is
    kept between steps has the parameters' dtype, or `state_dtype`; in bfloat16, whichever of them says so, it is
    rounded stochastically (see `kept_in`).

    Args:
      cfg: the `optimizer` section.
      learning_rate: the role's peak.
      num_steps: updates of the whole run.
      adapter: of the role's model: magnitudes that nothing reads do not decay either.
    """
    parts: list[optax.GradientTransformation] = []
    schedule = make_schedule(cfg, learning_rate, num_steps)
    decay = []
    if cfg.weight_decay:
        decay = [optax.add_decayed_weights(cfg.weight_decay, decay_mask if cfg.decay_mask == "matrices" else None)]
        if adapter is not None and cfg.decay_mask == "all":
            decay = [_of_what_is_read(decay[0], adapter)]
    if cfg.max_grad_norm:
        parts.append(clip_by_global_norm(cfg.max_grad_norm))
    if cfg.name == "adamw":
        parts.append(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps))
    elif cfg.name == "lion":
        parts.append(optax.scale_by_lion(cfg.b1, cfg.b2))
    elif cfg.name == "adafactor":
        parts += [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    elif cfg.name == "muon":
        parts.append(scale_by_muon(cfg.b1, cfg.b2, cfg.eps))
    elif cfg.name == "schedule_free":
        parts.append(schedule_free_adamw(schedule, cfg.b1, cfg.b2, cfg.eps, decay))
        return kept_in(optax.chain(*parts), cfg.state_dtype)
    elif is_name(cfg.name):  # it has its own decay and learning rate; the schedule's count says how many updates
        parts += [own_optimizer(cfg.name, schedule), optax.scale_by_schedule(lambda count: 1.0)]
        return kept_in(optax.chain(*parts), cfg.state_dtype)
    elif cfg.name == "sgd":
        parts += [optax.trace(cfg.b1)] if cfg.b1 else []  # without momentum nothing is kept
    else:
        raise ValueError(cfg.name)
    parts += [*decay, optax.scale_by_schedule(lambda count: -schedule(count))]
    if cfg.rate_factors:
        parts.append(scale_by_path(cfg.rate_factors))
    return kept_in(optax.chain(*parts), cfg.state_dtype)


def _of_what_is_read(decay: optax.GradientTransformation, adapter: Adapter) -> optax.GradientTransformation:
    """The same decay, of parameters that the model reads."""

    def update(updates, state, params=None):
        return decay.update(updates, state, adapter.without_still(params))

    return optax.GradientTransformation(decay.init, update)


def scale_by_path(factors: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Updates times the factor of the first pattern that their path matches; others stay as they are.

    With ("lora_b", 16.0) that is LoRA+ (arXiv 2402.12354, section 4.2).

    Args:
      factors: pairs of a regular expression of whole names of a path and a factor.
    """
    rules = [(path_pattern(pattern), factor) for pattern, factor in factors]

    def update(updates, state, params=None):
        del params

        def one(path, x):
            name = place(path_name(path)).path
            return x * next((factor for pattern, factor in rules if pattern.search(name)), 1.0)

        return jax.tree_util.tree_map_with_path(one, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def check_rate_factors(factors: Sequence[tuple[str, float]], params: Iterable[Params]) -> None:
    """Makes sure that each pattern of `optimizer.rate_factors` is of something that is trained.

    Args:
      factors: as `scale_by_path` takes them.
      params: what each role trains; a pattern may be of one of them.

    Raises:
      InputError: a pattern that matches no trained parameter, with the nearest name.
    """
    there = list(dict.fromkeys(place(path).path for tree in params for path in by_path(tree)))
    names = sorted({name for path in there for name in path.split("/")})
    for pattern, factor in factors:
        if not any(path_pattern(pattern).search(path) for path in there):
            near = get_close_matches(pattern, [*names, *there], n=1, cutoff=0.0)[0]
            raise InputError(
                f"optimizer.rate_factors {pattern!r} matches no trained parameter",
                f"whole names of a path such as {', '.join(there[:4])}",
                f"--config.optimizer.rate_factors='((\"{near}\", {factor}),)'",
            )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """All gradients by one factor, so that their norm together is at most `max_norm` (arXiv 1211.5063, algorithm 1).

    optax's function of this name divides each gradient by the norm.  The compiler keeps such quotients, a second copy
    of all gradients; products it recomputes where they are read.

    Args:
      max_norm: positive.
    """

    def update(updates, state, params=None):
        del params
        norm = global_norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def kept_in(optimizer: optax.GradientTransformation, dtype: Any = None) -> optax.GradientTransformation:
    """The same optimizer with its moments stored in `dtype` and its arithmetic in at least float32.

    In bfloat16 moments take half the bytes.  Rounding to nearest would ruin the second moment: with b2 = 0.999 a step
    moves it by at most a thousandth, and half the distance of two neighbouring bfloat16 numbers is two to four
    thousandths, so it would stop at a third to a fifth of its value and never fall.  So it is rounded stochastically
    (arXiv 1502.02551): up with a probability equal to the remainder, unbiased.  The noise that this adds to the second
    moment is a few percent, as large as that of the gradients.  DeepSeek-V3 (arXiv 2412.19437, section 3.3.3) keeps
    both moments in bfloat16 at b2 = 0.95, without an observable loss.

    The random bits are a hash of the number and of the updates made: the same state gives the same step, on any mesh.
    int8 takes a quarter of the bytes, see `quantised_moments`.

    Args:
      optimizer: with a schedule's count in its state.
      dtype: of the stored moments; None: that of each parameter. Counts keep their own.
    """
    if dtype == "int8":
        return _packed(optimizer)

    def init(params):
        return jax.tree.map(lambda x: x.astype(dtype or x.dtype) if _is_float(x) else x, optimizer.init(params))

    def update(updates, state, params=None):
        updates, new = optimizer.update(_wide(updates), _wide(state), _wide(params))
        count = updates_made(new)

        def store(x, old):
            return _stochastic_round(x, count) if old.dtype == jnp.bfloat16 else x.astype(old.dtype)

        return updates, jax.tree.map(store, new, state)

    return optax.GradientTransformation(init, update)


def _packed(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer with its moments in 8 bits."""

    def update(updates, state, params=None):
        updates, new = optimizer.update(_wide(updates), unpack(state), _wide(params))
        return updates, pack(new, updates_made(new))

    return optax.GradientTransformation(lambda params: pack(optimizer.init(params), 0), update)


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _wide(tree: Any) -> Any:
    """Floats in at least float32: optax's adafactor rounds its moments to the parameters' dtype by itself."""
    return jax.tree.map(lambda x: at_least_float32(x) if _is_float(x) else x, tree)


def _stochastic_round(x: jax.Array, count: jax.Array) -> jax.Array:
    """One of the two bfloat16 numbers around x, the nearer one more often: unbiased over counts."""
    exact = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(exact, jnp.uint32)
    # The last 16 bits are what bfloat16 drops; a number below 2^16 added to them carries as often as they are large.
    noise = rounding_bits(exact, count) >> 16
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(exact), rounded, exact).astype(jnp.bfloat16)


def decay_mask(params: Params) -> Any:
    """True for matrices, by name: a stacked norm's scale `[L, D]` has two dims but is none.

    >>> decay_mask({"norm": {"scale": 0}, "lm_head": {"kernel": 0, "bias": 0}, "embed": {"embedding": 0}})
    {'embed': {'embedding': True}, 'lm_head': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias", "magnitude"), params)


def updates_made(opt_state: Any) -> jax.Array:
    """How many updates the optimizer has applied: its schedule's count, which skipped updates leave as it was."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(x)]
    return found[0].count

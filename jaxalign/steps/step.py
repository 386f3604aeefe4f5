"""The train step and the eval step: one for every algorithm, pure functions of state and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.ops.precision import at_least_float32
from jaxalign.steps.loss_scale import LossScale
from jaxalign.types import Params, Terms, TrainState

Sum = tuple[jax.Array, jax.Array]  # (sum, weight), both scalars; divided once, at the very end


class Sums(NamedTuple):
    """What an objective returns for a micro-batch."""

    loss: dict[str, Sum]  # by role of the trained parameters
    metrics: dict[str, Sum]
    counts: dict[str, jax.Array] = {}  # noqa: RUF012  totals that are added up and never divided, such as "tokens"


# (params by role, frozen by role, extra, batch) -> Sums of the roles that are given, one or all of them: the loss of a
# role depends on that role's parameters alone.
Objective = Callable[[dict[str, Params], dict[str, Params], dict[str, jax.Array], Any], Sums]


def reduce_terms(terms: Terms) -> Sum:
    """A loss's per-item terms as (sum of weight * loss, sum of weight)."""
    return jnp.sum(terms.loss * terms.weight), jnp.sum(terms.weight)


def divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight, and 0 where nothing had weight."""
    return total / jnp.where(weight == 0, 1, weight)


def make_train_step(
    objective: Objective,
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    grad_accum_steps: int = 1,
    loss_scaling: bool = False,
    early_stop: Callable[[dict[str, jax.Array]], jax.Array] | None = None,
) -> Callable[[TrainState, dict[str, Params], Any], tuple[TrainState, dict[str, jax.Array]]]:
    """A train step: gradients of the objective over all micro-batches, then one optimizer update per role.

    gradient of a role = (sum over micro-batches and devices of the loss sums)' / (sum of their weights)

    so that A micro-batches of B / A rows equal one of B rows, ragged weights included.  Micro-batch a holds the rows b
    with b % A == a, which on a batch-sharded mesh moves nothing between devices.

    Nothing is updated (a mask, not a branch) where the loss or a gradient is not finite, where the batch has no weight,
    and while `extra["skip"]` is set.  The step counter advances all the same.

    Args:
      objective: the loss of each of the roles that are the keys of `optimizers`; asked for one after the other, so
        that no more is kept than the largest of them needs.
      optimizers: an optax transformation per trained role.
      grad_accum_steps: micro-batches A; divides the number of rows.
      loss_scaling: scale each micro-batch's mean loss for float16 gradients; the scale lives in `extra` (see
        `LossScale.initial`).
      early_stop: of this batch's metrics, whether this update and the following ones are to be skipped; sets
        `extra["skip"]`, which stays until whoever drives the loop clears it.

    Returns:
      step(state, frozen, batch) -> (state, metrics).  Pure; the caller jits it and donates `state`.  Metrics, scalars:
      those of the objective, `loss`, `weight` (the loss's divisor), `grad_norm` (before the optimizer clips),
      `param_norm` (after the update), `update_norm` (of what the parameters really moved), each with `/<role>` appended
      where there are several roles; `skipped`, 1 where a non-finite value blocked the update; with loss scaling
      `loss_scale` and `overflow`.
    """
    roles = tuple(sorted(optimizers))

    def gradients(params, frozen, extra, scale, batch):
        """Sums of one micro-batch and the gradients of its loss sums, in at least float32."""

        def factor(_, weight):
            # float16 holds the gradient of a mean: that of a sum over thousands of tokens overflows by itself.
            return scale / jnp.where(weight == 0, 1, jax.lax.stop_gradient(weight)) if loss_scaling else 1.0

        grads, found = {}, Sums({}, {}, {})
        for role in roles:
            own = params[role]
            if grads:  # what a model keeps for its backward pass is gone before the next model's forward pass
                own, grads = jax.lax.optimization_barrier((own, grads))

            def scalar(own, role=role):
                sums = objective({role: own}, frozen, extra, batch)
                if set(sums.loss) != {role}:
                    raise ValueError(f"the objective has losses for {sorted(sums.loss)}, the optimizer is for {role!r}")
                return sums.loss[role][0] * factor(*sums.loss[role]), sums

            grad, sums = jax.grad(scalar, has_aux=True)(own)
            grad = jax.tree.map(at_least_float32, grad)
            if loss_scaling:
                scaled = factor(*sums.loss[role])
                grad = jax.tree.map(lambda g, f=scaled: g / f, grad)
            grads = grads | {role: grad}
            found = Sums(*(there | new for there, new in zip(found, sums, strict=True)))
        return grads, found

    def step(state: TrainState, frozen: dict[str, Params], batch: Any):
        params = {role: state.params[role] for role in roles}
        extra = dict(state.extra)
        scale = LossScale.current(extra) if loss_scaling else jnp.float32(1)
        grads, sums = _accumulate(
            lambda micro: gradients(params, frozen, state.extra, scale, micro), batch, grad_accum_steps
        )

        name = (lambda metric, role: metric) if len(roles) == 1 else (lambda metric, role: f"{metric}/{role}")
        metrics = {key: divide(*value) for key, value in sums.metrics.items()} | dict(sums.counts)
        loss_finite, grads_finite = jnp.array(True), jnp.array(True)
        for role in roles:
            total, weight = sums.loss[role]
            metrics[name("loss", role)], metrics[name("weight", role)] = divide(total, weight), weight
            # A product, which the compiler repeats wherever gradients are read; quotients it would keep, all of them.
            share = 1 / jnp.where(weight == 0, 1, weight)
            grads[role] = jax.tree.map(lambda g, s=share: g * s.astype(g.dtype), grads[role])
            norm = global_norm(grads[role])
            metrics[name("grad_norm", role)] = norm
            loss_finite &= jnp.isfinite(total)
            grads_finite &= jnp.isfinite(norm)

        finite = loss_finite & grads_finite
        overflow = jnp.array(False)
        if loss_scaling:
            overflow = loss_finite & ~grads_finite & LossScale.can_shrink(extra)
            weightless = functools.reduce(jnp.logical_and, [sums.loss[role][1] == 0 for role in roles])
            scaled = LossScale.updated(extra, finite, overflow)  # a batch that says nothing is no good step
            extra |= {name: jnp.where(weightless, extra[name], value) for name, value in scaled.items()}
            metrics["loss_scale"], metrics["overflow"] = scale, at_least_float32(overflow)
        metrics["skipped"] = at_least_float32(~finite & ~overflow)
        apply = finite
        if early_stop is not None:
            extra["skip"] = extra["skip"] | early_stop(metrics)
        if "skip" in extra:
            apply &= ~extra["skip"]
            metrics["stopped"] = at_least_float32(extra["skip"])

        new_params, new_opt = dict(state.params), dict(state.opt)
        for role in roles:
            mask = apply & (sums.loss[role][1] != 0)
            new_params[role], new_opt[role] = _update(
                optimizers[role], grads[role], state.opt[role], params[role], mask
            )
            metrics[name("param_norm", role)] = global_norm(new_params[role])
            metrics[name("update_norm", role)] = global_norm(
                jax.tree.map(
                    lambda new, old: at_least_float32(new) - at_least_float32(old), new_params[role], params[role]
                )
            )
        new_state = state._replace(step=state.step + 1, params=new_params, opt=new_opt, extra=extra)
        return new_state, metrics

    return step


def make_eval_step(objective: Objective):
    """An eval step: (params, frozen, extra, batch) -> {name: (sum, weight)}, to be added up over batches, then divided.

    The objective's metrics and its loss (`loss`, or `loss/<role>` where there are several roles).
    """

    def step(params, frozen, extra, batch) -> dict[str, Sum]:
        sums = objective(params, frozen, extra, batch)
        one = len(sums.loss) == 1
        return {("loss" if one else f"loss/{role}"): value for role, value in sums.loss.items()} | dict(sums.metrics)

    return step


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves together, in at least float32."""
    return jnp.sqrt(
        sum((jnp.sum(jnp.square(at_least_float32(x))) for x in jax.tree.leaves(tree)), start=jnp.float32(0))
    )


def _update(tx, grads, opt, params, mask):
    """One optimizer update where `mask`; every leaf keeps its dtype, whatever optax promotes to."""
    updates, new_opt = tx.update(grads, opt, params)
    new_params = jax.tree.map(lambda p, u: (at_least_float32(p) + u).astype(p.dtype), params, updates)

    def choose(new, old):
        return jnp.where(mask, new.astype(old.dtype), old)

    return jax.tree.map(choose, new_params, params), jax.tree.map(choose, new_opt, opt)


def _accumulate(fn, batch, count):
    """Sum of fn(micro-batch) over the `count` micro-batches."""
    if count == 1:
        return fn(batch)
    rows = {x.shape[0] for x in jax.tree.leaves(batch)}
    if len(rows) != 1 or next(iter(rows)) % count:
        raise ValueError(f"{count} equal micro-batches of batches with {sorted(rows)} rows")

    def micro(index):
        # [B] -> [B / A, A]: each device keeps its own rows; only the unsplit second dim is indexed
        def pick(x):
            x = x.reshape(x.shape[0] // count, count, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)

        return jax.tree.map(pick, batch)

    shapes = jax.eval_shape(lambda: fn(micro(0)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total, index):
        # The barrier keeps a gradient's reduction apart from the sum: the TPU compiler moves such pairs out of the loop
        # and fails on an untied head's.
        return jax.tree.map(jnp.add, total, jax.lax.optimization_barrier(fn(micro(index)))), None

    return jax.lax.scan(body, zeros, jnp.arange(count))[0]

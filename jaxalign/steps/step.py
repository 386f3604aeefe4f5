"""The train step and the eval step: one for every algorithm, pure functions of state and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.ops.precision import at_least_float32
from jaxalign.ops.trees import joined
from jaxalign.steps.loss_scale import LossScale
from jaxalign.steps.objective import Objective, Sum, Sums, divide, losses, several, sums_of
from jaxalign.types import Params, TrainState


def make_train_step(
    objective: Objective,
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    grad_accum_steps: int = 1,
    loss_scaling: bool = False,
    early_stop: Callable[[dict[str, jax.Array]], jax.Array] | None = None,
) -> Callable[[TrainState, dict[str, Params], Any], tuple[TrainState, dict[str, jax.Array]]]:
    """A train step: gradients of the objective over all micro-batches, then one optimizer update per role.

    gradient of a role = sum over its terms of coef / W * (sum over micro-batches and devices of S)'

    so that A micro-batches of B / A rows equal one of B rows, ragged weights included.  Micro-batch a holds the rows b
    with b % A == a, which on a batch-sharded mesh moves nothing between devices.

    Nothing is updated (a mask, not a branch) where the loss or a gradient is not finite, where none of a role's terms
    has weight, and while `extra["skip"]` is set.  The step counter advances all the same.

    Args:
      objective: the loss of each of the roles that are the keys of `optimizers`; asked for one after the other, so
        that the peak is that of the largest.
      optimizers: an optax transformation per trained role.
      grad_accum_steps: micro-batches A; divides the number of rows.
      loss_scaling: scale the loss for float16 gradients; the scale lives in `extra` (see `LossScale.initial`).
      early_stop: of this batch's metrics, whether this update and the following ones are to be skipped; sets
        `extra["skip"]`, which stays until the caller clears it.

    Returns:
      step(state, frozen, batch) -> (state, metrics).  Pure; the caller jits it and donates `state`.  `frozen` may hold
      the rest of a role whose parameters are trained in part: the objective is given the two joined.  Metrics, scalars:
      those of the objective, `loss`, `weight` (the loss's divisor, of several terms their sum), `grad_norm` (before the
      optimizer clips), `param_norm` (after the update), `update_norm` (of what the parameters really moved), each with
      `/<role>` appended where there are several roles; `term/<term>`, S / W, where a role has several terms;
      `skipped`, 1 where a non-finite value blocked the update; with loss scaling `loss_scale` and `overflow`.
    """
    roles = tuple(sorted(optimizers))

    def by_role(loss, params, frozen, batch):
        """Gradients of `loss(parameters of one role, rows) -> (scalar, sums)` over all micro-batches, and the sums."""
        grads, found = {}, Sums({})
        for role in roles:
            own = params[role]
            if grads:  # frees one model's activations before the next model's forward pass
                own, grads = jax.lax.optimization_barrier((own, grads))
            of_trained = lambda own, micro, role=role: loss(joined({role: own}, frozen), micro)  # noqa: E731
            grad, sums = _gradients(of_trained, own, batch, grad_accum_steps)
            grads = grads | {role: grad}
            found = Sums(*(there | new for there, new in zip(found, sums, strict=True)))
        return grads, found

    def gradients(params, frozen, extra, weights, statistics, scale, batch):
        """Gradients of the batch's loss times `scale`, and its sums."""

        def loss(given, batch):
            sums = sums_of(objective, weights, given, frozen, extra, statistics, batch)
            means = [jnp.sum(divide(*each)) for each in losses(objective, weights, sums).values()]
            return scale * sum(means), sums

        if objective.items is None:
            return by_role(loss, params, frozen, batch)

        def items(given, batch):
            return objective.items(given, frozen, extra, batch)

        if grad_accum_steps == 1:  # one forward pass, not two
            return by_role(lambda own, batch: loss(items(own, batch), batch), params, frozen, batch)
        whole = _collect(lambda micro: items(joined(params, frozen), micro), batch, grad_accum_steps)
        cotangents, sums = jax.grad(loss, has_aux=True)(whole, batch)

        def linear(own, micro):  # its gradient equals the loss's
            found = items(own, micro[0])
            products = jax.tree.map(lambda x, d: jnp.sum(x * d), found, {role: micro[1][role] for role in found})
            return sum(jax.tree.leaves(products)), Sums({})

        return by_role(linear, params, frozen, (batch, cotangents))[0], sums

    def step(state: TrainState, frozen: dict[str, Params], batch: Any):
        params = {role: state.params[role] for role in roles}
        extra = dict(state.extra)
        scale = LossScale.current(extra) if loss_scaling else jnp.float32(1)
        weights, statistics = objective.weights(batch), None
        if objective.statistics is not None:
            statistics = _accumulate(
                lambda micro: objective.statistics(joined(params, frozen), frozen, state.extra, micro),
                batch,
                grad_accum_steps,
            )
        grads, sums = gradients(params, frozen, state.extra, weights, statistics, scale, batch)
        if loss_scaling:
            grads = jax.tree.map(lambda g: g * (1 / scale).astype(g.dtype), grads)

        name = (lambda metric, role: metric) if len(roles) == 1 else (lambda metric, role: f"{metric}/{role}")
        metrics = {key: divide(*value) for key, value in sums.metrics.items()} | dict(sums.counts)
        metrics |= {key: divide(*value) for key, value in several(weights, sums).items()}
        loss_finite, grads_finite, weight = jnp.array(True), jnp.array(True), {}
        for role, (totals, divisors) in losses(objective, weights, sums).items():
            loss, weight[role] = jnp.sum(divide(totals, divisors)), jnp.sum(divisors)
            metrics[name("loss", role)], metrics[name("weight", role)] = loss, weight[role]
            norm = metrics[name("grad_norm", role)] = global_norm(grads[role])
            loss_finite &= jnp.isfinite(loss)
            grads_finite &= jnp.isfinite(norm)

        finite = loss_finite & grads_finite
        overflow = jnp.array(False)
        some = functools.reduce(jnp.logical_or, [weight[role] != 0 for role in roles])
        if loss_scaling:
            overflow = loss_finite & ~grads_finite & LossScale.can_shrink(extra)
            scaled = LossScale.updated(extra, finite, overflow)  # a batch without weight does not count as a good step
            extra |= {name: jnp.where(some, value, extra[name]) for name, value in scaled.items()}
            metrics["loss_scale"], metrics["overflow"] = scale, at_least_float32(overflow)
        metrics["skipped"] = at_least_float32(~finite & ~overflow)
        apply = finite
        if early_stop is not None:
            extra["skip"] = extra["skip"] | early_stop(metrics)
        if "skip" in extra:
            apply &= ~extra["skip"]
            metrics["stopped"] = at_least_float32(extra["skip"])
        if objective.next_extra is not None:
            new = objective.next_extra(state.extra, statistics, sums)
            if unknown := sorted(new.keys() - extra.keys()):
                raise ValueError(f"the objective changes {unknown} of a state's extra, which holds {sorted(extra)}")
            extra |= {
                key: jnp.where(apply & some, value, extra[key]).astype(extra[key].dtype) for key, value in new.items()
            }

        new_params, new_opt = dict(state.params), dict(state.opt)
        for role in roles:
            mask = apply & (weight[role] != 0)
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


def make_eval_step(objective: Objective, *, grad_accum_steps: int = 1):
    """An eval step: (params, frozen, extra, batch) -> {name: (sum, weight)}, to be added up over batches, then divided.

    The objective's metrics and its loss (`loss`, or `loss/<role>` where there are several roles).  A loss of several
    terms has [terms] sums and weights: it is the sum of their quotients, and each is `term/<term>` as well.  Statistics
    and comparisons of items are within a batch, whole.

    Args:
      objective: the loss of each role.
      grad_accum_steps: the train step's micro-batches, one of which goes through the models at a time here too: what
        fits in memory to train on fits to evaluate.
    """

    def step(params, frozen, extra, batch) -> dict[str, Sum]:
        weights, statistics, whole = objective.weights(batch), None, joined(params, frozen)
        if objective.statistics is not None:
            statistics = _accumulate(
                lambda micro: objective.statistics(whole, frozen, extra, micro), batch, grad_accum_steps
            )

        def sums_in(given, rows):
            return sums_of(objective, weights, given, frozen, extra, statistics, rows)

        if objective.items is None:
            sums = _accumulate(lambda micro: sums_in(whole, micro), batch, grad_accum_steps)
        else:
            items = _collect(lambda micro: objective.items(whole, frozen, extra, micro), batch, grad_accum_steps)
            sums = sums_in(items, batch)
        found = losses(objective, weights, sums)
        named = {("loss" if len(found) == 1 else f"loss/{role}"): value for role, value in found.items()}
        return named | several(weights, sums) | dict(sums.metrics)

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


def _gradients(loss, own, batch, count):
    """Gradients of `loss(own, rows) -> (scalar, sums)`, summed over micro-batches in at least float32, and the sums.

    Those of layers are added up where the sum lies: there is no second copy, of one micro-batch.
    """
    if count == 1:
        grad, sums = jax.grad(loss, has_aux=True)(own, batch)
        return jax.tree.map(at_least_float32, grad), sums
    wide = jax.tree.map(at_least_float32, own)
    of_layers = jax.tree_util.tree_map_with_path(lambda path, _: path[:1] == (jax.tree_util.DictKey("layers"),), own)
    total = jax.tree.map(lambda added, x: jax.new_ref(jnp.zeros_like(x)) if added else x, of_layers, wide)

    def add(micro):
        narrow = lambda wide: jax.tree.map(lambda x, like: x.astype(like.dtype), wide, own)  # noqa: E731
        value, backward, sums = jax.vjp(lambda wide: loss(narrow(wide), micro), wide, has_aux=True)
        (grads,) = backward.with_refs(total)(jnp.ones_like(value))
        return jax.tree.map(lambda added, grad: () if added else grad, of_layers, grads), sums

    grads, sums = _accumulate(add, batch, count)
    choose = lambda added, ref, grad: jax.freeze(ref) if added else grad  # noqa: E731
    return jax.tree.map(choose, of_layers, total, grads), sums


def _accumulate(fn, batch, count):
    """Sum of fn(micro-batch) over the `count` micro-batches."""
    if count == 1:
        return fn(batch)
    micro = _micro_batches(batch, count)
    shapes = jax.eval_shape(lambda: fn(micro(0)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total, index):
        # The barrier keeps a gradient's reduction apart from the sum: the TPU compiler moves such pairs out of the loop
        # and fails on an untied head's.
        return jax.tree.map(jnp.add, total, jax.lax.optimization_barrier(fn(micro(index)))), None

    return jax.lax.scan(body, zeros, jnp.arange(count))[0]


def _collect(fn, batch, count):
    """fn(micro-batch), [B / A, ...], of all micro-batches, in the order of the batch's rows: [B, ...]."""
    if count == 1:
        return fn(batch)
    micro = _micro_batches(batch, count)
    found = jax.lax.map(lambda index: fn(micro(index)), jnp.arange(count))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), found)


def _micro_batches(batch, count):
    """The function from an index to its micro-batch."""
    rows = {x.shape[0] for x in jax.tree.leaves(batch)}
    if len(rows) != 1 or next(iter(rows)) % count:
        raise ValueError(f"{count} equal micro-batches of batches with {sorted(rows)} rows")

    def micro(index):
        # [B] -> [B / A, A]: each device keeps its own rows; only the unsplit second dim is indexed
        def pick(x):
            x = x.reshape(x.shape[0] // count, count, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)

        return jax.tree.map(pick, batch)

    return micro

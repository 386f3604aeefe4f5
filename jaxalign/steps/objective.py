"""What a step minimises: an objective's terms, each with its own divisor, and the sums that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.types import Terms

Sum = tuple[jax.Array, jax.Array]  # (sum, weight); of a loss of several terms [terms] each: the sum of their quotients


class Sums(NamedTuple):
    """What an objective's `terms` returns for a micro-batch; all of it adds up over micro-batches."""

    terms: dict[str, jax.Array]  # S by term: neither divided nor times its coefficient
    metrics: dict[str, Sum] = {}  # noqa: RUF012
    counts: dict[str, jax.Array] = {}  # noqa: RUF012  totals that are never divided, such as "tokens"
    aux: dict[str, dict[str, jax.Array]] = {}  # noqa: RUF012  by role, the sums that its `apply` returns beside hidden


class Objective(NamedTuple):
    """What a step minimises: for each trained role a sum of terms, each with its own divisor.

        loss of a role = sum over its terms of coef * S / W

    A term is named after its role, or `role/name` where a role has several ("policy/pairs", "policy/nll").  W comes
    from the whole batch before any forward pass and S is a sum over items, so that accumulation and sharding equal the
    large batch.  The loss of a role depends on that role's parameters alone.  Most objectives need two fields:

    >>> def terms(params, frozen, extra, statistics, batch):
    ...     return Sums({"policy": jnp.sum((params["policy"] - batch) ** 2)})
    >>> objective = Objective(lambda batch: {"policy": jnp.float32(batch.size)}, terms)
    >>> from jaxalign.steps.step import make_eval_step
    >>> total, weight = make_eval_step(objective)({"policy": jnp.float32(1)}, {}, {}, jnp.array([1.0, 3.0]))["loss"]
    >>> print(total, weight)
    4.0 2.0
    """

    # (batch) -> {term: W}, of masks and weights alone.  An entry "role/name" makes a term of that name in `Sums.aux`.
    weights: Callable[[Any], dict[str, jax.Array]]
    # (params by role, frozen by role, extra, statistics, batch) -> Sums of the roles that are given, one or all.
    terms: Callable[..., Sums]
    coefs: Mapping[str, float] = {}  # of terms; 1 where absent
    # (params, frozen, extra, batch) -> a tree of sums, where an item's loss depends on means over the batch: a pass
    # over all micro-batches before the first, without gradient; `terms` is given their total.
    statistics: Callable[..., Any] | None = None
    # (params of one role or all, frozen, extra, batch) -> {role: a tree of [B, ...]}, where the loss compares items, as
    # those that sort do: `terms` is given these of the whole batch in the place of the parameters.  Over several
    # micro-batches that takes two forward passes: one for the items, one for the parameters' gradients by the loss's
    # cotangents of them.
    items: Callable[..., dict[str, Any]] | None = None
    # (extra, statistics, Sums of the whole batch) -> the entries of `TrainState.extra` that change, such as running
    # means; they stay where the update is masked.
    next_extra: Callable[[dict[str, jax.Array], Any, Sums], dict[str, jax.Array]] | None = None


def weighted_sum(terms: Terms) -> jax.Array:
    """S of a loss's per-item terms: sum of weight * loss."""
    return jnp.sum(terms.loss * terms.weight)


def divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight, and 0 where nothing had weight."""
    return total / jnp.where(weight == 0, 1, weight)


def sums_of(objective, weights, given, frozen, extra, statistics, batch) -> Sums:
    """The sums of what is given by role, with those auxiliary sums among the terms that have a divisor."""
    sums = objective.terms(given, frozen, extra, statistics, batch)
    aux = {f"{role}/{name}": s for role, found in sums.aux.items() for name, s in found.items()}
    terms = sums.terms | {term: s for term, s in aux.items() if term in weights}
    if lacking := sorted((terms.keys() | objective.coefs.keys()) - weights.keys()):
        raise ValueError(f"the objective's terms {lacking} have no divisor: its weights are of {sorted(weights)}")
    if (found := {_role(term) for term in terms}) != given.keys():
        asked = ", ".join(map(repr, given))
        raise ValueError(f"the objective has losses for {sorted(found)}, the optimizer is for {asked}")
    return sums._replace(terms=terms, aux={})


def _role(term: str) -> str:
    return term.partition("/")[0]


def losses(objective, weights, sums: Sums) -> dict[str, Sum]:
    """(coef * S, W) of each role: scalars, or [terms] where there are several."""
    found: dict[str, list[Sum]] = {}
    for term, total in sorted(sums.terms.items()):  # sums over micro-batches have them in this order, others in any
        found.setdefault(_role(term), []).append((objective.coefs.get(term, 1) * total, weights[term]))
    stacked = lambda pairs: (jnp.stack([s for s, _ in pairs]), jnp.stack([w for _, w in pairs]))  # noqa: E731
    return {role: pairs[0] if len(pairs) == 1 else stacked(pairs) for role, pairs in found.items()}


def several(weights, sums: Sums) -> dict[str, Sum]:
    """(S, W) of each term, where a role has several."""
    roles = [_role(term) for term in sums.terms]
    return {f"term/{t}": (total, weights[t]) for t, total in sums.terms.items() if roles.count(_role(t)) > 1}

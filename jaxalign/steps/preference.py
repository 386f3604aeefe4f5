"""Direct preference optimization: DPO and its relatives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.errors import InputError
from jaxalign.ops.logits import Head
from jaxalign.ops.losses_preference import BY_TOKEN, PREFERENCE_LOSSES
from jaxalign.ops.readout import completion_sums, pairs, read_with_aux, token_logprobs
from jaxalign.steps.objective import Objective, Sums
from jaxalign.types import Batch, Params, Terms


def sequence_logprobs(
    apply: Callable[..., Any], head: Callable[[Params], jax.Array | Head], params: Params, batch: Batch
) -> jax.Array:
    """Log-prob of each completion given its prompt, summed over its scored tokens: [B, C], in nats, at least float32.

    Policy and reference, live or cached, both get their log-probs here.
    """
    return logprobs_and_aux(apply, head, params, batch)[0]


def logprobs_and_aux(apply, head, params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `sequence_logprobs`, and the model's auxiliary sums."""
    hidden, readouts, aux = read_with_aux(apply, params, batch.rows, batch.readouts)
    logprobs, _ = token_logprobs(hidden, head(params), readouts)
    return completion_sums(logprobs, readouts, batch.completions.mask.shape[1]), aux


def preference_objective(
    apply: Callable[..., Any],
    head: Callable[[Params], jax.Array | Head],
    *,
    loss: str | Callable[..., Terms],
    beta: float,
    label_smoothing: float,
    reference: str,
    extra_losses: Sequence[tuple[str | Callable[..., Terms], float]] = (),
    ref_apply: Callable[..., Any] | None = None,
    ref_head: Callable[[Params], jax.Array | Head] | None = None,
    **options: Any,
) -> Objective:
    """The mean of a preference loss over the batch's pairs, each weighted by its record; or of several, weighted.

    Args:
      apply: (params, rows, *, sources) -> (hidden [B, M, D], cache, aux).
      head: params -> [D, V], or a `Head`.
      loss: a name in `PREFERENCE_LOSSES`, or a function of the same form.
      beta: strength of the tie to the reference.
      label_smoothing: share of labels taken to be wrong; an error where no loss has such a form and it is not 0.
      reference: "live", the forward of `frozen["ref"]` in the same step; "cached", `batch.completions.ref_logprob`;
        "none": log-ratios are the policy's log-probs.
      extra_losses: further losses on the same pairs, each with the weight that it is added with.
      ref_apply: of a live reference, whose model may be another: it has no adapter, or one of its own; None: `apply`.
      ref_head: likewise; None: `head`.
      options: further options of the losses: each gets those that its signature has.

    Returns:
      The objective of the role "policy".
    """
    weighted = [(loss, 1.0), *extra_losses]
    losses = {_key(one): PREFERENCE_LOSSES[one] if isinstance(one, str) else one for one, _ in weighted}
    taken = {key: inspect.signature(function).parameters.keys() for key, function in losses.items()}
    if any("label_smoothing" in names for names in taken.values()):
        options["label_smoothing"] = label_smoothing
    elif label_smoothing:
        raise InputError(
            f"label_smoothing {label_smoothing} with the {loss} loss",
            "0: this loss has no smoothed form",
            "--config.algorithm.label_smoothing=0",
        )
    if unknown := options.keys() - set().union(*taken.values()):
        raise TypeError(f"no loss among {', '.join(losses)} takes {', '.join(sorted(unknown))}")
    if reference not in ("live", "cached", "none"):
        raise ValueError(f"reference is 'live', 'cached' or 'none', not {reference!r}")
    of_ref = ref_apply or apply, ref_head or head
    term_of = {key: f"policy/{key}" if extra_losses else "policy" for key in losses}
    coefs = {term_of[_key(one)]: coef for one, coef in weighted if extra_losses}

    def divided_by(key: str, batch: Batch) -> jax.Array:
        """The weights over whose sum a loss is divided, [B * C']."""
        weight = pair_weights(batch)
        return weight * _tokens(batch)["chosen"] if key in BY_TOKEN else weight

    def terms(params, frozen, extra, statistics, batch: Batch) -> Sums:
        del extra, statistics
        weight = pair_weights(batch)
        logprobs, aux = logprobs_and_aux(apply, head, params["policy"], batch)
        if reference == "live":
            ref_logprobs = jax.lax.stop_gradient(sequence_logprobs(*of_ref, frozen["ref"], batch))
        else:
            ref_logprobs = batch.completions.ref_logprob if reference == "cached" else jnp.zeros_like(logprobs)
        lengths = _tokens(batch)
        sides = by_pair(logprobs, batch), by_pair(ref_logprobs, batch), lengths, weight
        found = {
            key: function(*sides, beta=beta, **{name: options[name] for name in options if name in taken[key]})
            for key, function in losses.items()
        }
        scored = jnp.sum(jnp.where(weight != 0, lengths["chosen"] + lengths["rejected"], 0))
        totals = {term_of[key]: pair_sum(one, divided_by(key, batch)) for key, one in found.items()}
        return Sums(totals, found[_key(loss)].metrics, {"tokens": scored}, {"policy": aux})

    return Objective(lambda batch: {term_of[key]: jnp.sum(divided_by(key, batch)) for key in losses}, terms, coefs)


def _key(loss: str | Callable[..., Terms]) -> str:
    """What a loss is called among several; a function never as one of the table is."""
    if isinstance(loss, str):
        return loss
    name = getattr(loss, "__name__", "own")
    return f"own_{name}" if name in PREFERENCE_LOSSES else name


def _tokens(batch: Batch) -> dict[str, jax.Array]:
    """Scored tokens of both sides of each pair, [B * C']."""
    found = completion_sums(batch.readouts.mask, batch.readouts, batch.completions.mask.shape[1])
    return by_pair(found, batch)


def pair_sum(terms: Terms, weight: jax.Array) -> jax.Array:
    """S of a loss on pairs: sum of weight * loss, by the divisor's weights whatever those of the terms are."""
    return jnp.sum(jnp.where(weight != 0, terms.loss, 0) * weight)


def by_pair(values: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Values of completions, [B, C], as flat arrays of pairs [B * C']; a pair that is not whole gets zeros."""
    return {name: array.reshape(-1) for name, array in pairs(values, batch.completions).items()}


def pair_weights(batch: Batch) -> jax.Array:
    """Weight of each pair, [B * C']: that of its record, 0 where it is not whole."""
    return by_pair(batch.completions.weight, batch)["chosen"]

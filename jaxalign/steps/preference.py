"""Direct preference optimization: DPO and its relatives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.errors import InputError
from jaxalign.ops.logits import Head
from jaxalign.ops.losses_preference import PREFERENCE_LOSSES
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
    ref_apply: Callable[..., Any] | None = None,
    ref_head: Callable[[Params], jax.Array | Head] | None = None,
    **options: Any,
) -> Objective:
    """The mean of a preference loss over the batch's pairs, each weighted by its record.

    Args:
      apply: (params, rows, *, sources) -> (hidden [B, M, D], cache, aux).
      head: params -> [D, V], or a `Head`.
      loss: a name in `PREFERENCE_LOSSES`, or a function of the same form.
      beta: strength of the tie to the reference.
      label_smoothing: share of labels taken to be wrong; an error where the loss has no such form and it is not 0.
      reference: "live", the forward of `frozen["ref"]` in the same step; "cached", `batch.completions.ref_logprob`.
      ref_apply: of a live reference, whose model may be another: it has no adapter, or one of its own; None: `apply`.
      ref_head: likewise; None: `head`.
      options: further options of the loss.

    Returns:
      The objective of the role "policy".
    """
    terms_of = PREFERENCE_LOSSES[loss] if isinstance(loss, str) else loss
    if "label_smoothing" in inspect.signature(terms_of).parameters:
        options["label_smoothing"] = label_smoothing
    elif label_smoothing:
        raise InputError(
            f"label_smoothing {label_smoothing} with the {loss} loss",
            "0: this loss has no smoothed form",
            "--config.algorithm.label_smoothing=0",
        )
    if reference not in ("live", "cached"):
        raise ValueError(f"reference is 'live' or 'cached', not {reference!r}")
    of_ref = ref_apply or apply, ref_head or head

    def terms(params, frozen, extra, statistics, batch: Batch) -> Sums:
        del extra, statistics
        completions, weight = batch.completions, pair_weights(batch)
        logprobs, aux = logprobs_and_aux(apply, head, params["policy"], batch)
        if reference == "live":
            ref_logprobs = jax.lax.stop_gradient(sequence_logprobs(*of_ref, frozen["ref"], batch))
        else:
            ref_logprobs = completions.ref_logprob
        tokens = completion_sums(batch.readouts.mask, batch.readouts, completions.mask.shape[1])
        policy, ref, lengths = (by_pair(x, batch) for x in (logprobs, ref_logprobs, tokens))
        found = terms_of(policy, ref, lengths, weight, beta=beta, **options)
        scored = jnp.sum(jnp.where(weight != 0, lengths["chosen"] + lengths["rejected"], 0))
        return Sums({"policy": pair_sum(found, weight)}, found.metrics, {"tokens": scored}, {"policy": aux})

    return Objective(lambda batch: {"policy": jnp.sum(pair_weights(batch))}, terms)


def pair_sum(terms: Terms, weight: jax.Array) -> jax.Array:
    """S of a loss on pairs: sum of weight * loss, by the divisor's weights whatever those of the terms are."""
    return jnp.sum(jnp.where(weight != 0, terms.loss, 0) * weight)


def by_pair(values: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Values of completions, [B, C], as flat arrays of pairs [B * C']; a pair that is not whole gets zeros."""
    return {name: array.reshape(-1) for name, array in pairs(values, batch.completions).items()}


def pair_weights(batch: Batch) -> jax.Array:
    """Weight of each pair, [B * C']: that of its record, 0 where it is not whole."""
    return by_pair(batch.completions.weight, batch)["chosen"]

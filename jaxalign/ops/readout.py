"""Reading hidden states out at chosen places: log-probs and entropies of tokens, scalar scores.

The vocabulary-sized work happens here and only for readouts, in chunks, so that no [B, M, V] array is ever held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.ops.attention_scores import sloped
from jaxalign.ops.logits import Head, logits, parts
from jaxalign.ops.platform import platform
from jaxalign.ops.precision import at_least_float32
from jaxalign.ops.vocabulary import VocabularyShards, hits, over_chunks
from jaxalign.types import CHOSEN, REJECTED, Completions, Params, Readouts, Rows

# Logits a device holds at one time, in numbers, enough for matmuls at full speed: 64 MiB of float32 on a CPU, half a
# GiB on an accelerator, which reads the whole head from memory for each chunk.
_MAX_LOGITS = {"cpu": 2**24}
_ACCELERATOR_MAX_LOGITS = 2**27


def take_sources(of_tokens: jax.Array, source: jax.Array) -> jax.Array:
    """What an array holds of the tokens that are read, [B, T, ...] and [B, M] -> [B, M, ...].

    `take_along_axis` keeps the gather and its transpose within each row: no collective on a batch-sharded mesh,
    where `hidden[arange(B)[:, None], source]` all-reduces every hidden state.
    """
    source = source.reshape(*source.shape, *(1,) * (of_tokens.ndim - 2))
    return jnp.take_along_axis(of_tokens, source, axis=1, mode="clip")


def read_hidden(
    apply: Callable[..., Any], params: Params, rows: Rows, readouts: Readouts
) -> tuple[jax.Array, Readouts]:
    """The hidden states that are read, and no others where the model can leave them out.

    Args:
      apply: (params, rows, *, sources) -> (hidden [B, M, D], cache, aux).
      params: of the model.
      rows: [B, T].
      readouts: fields [B, M].

    Returns:
      hidden [B, M, D], and the readouts of these, for `token_logprobs` and `scalar_readout`.
    """
    return read_with_aux(apply, params, rows, readouts)[:2]


def read_with_aux(
    apply: Callable[..., Any], params: Params, rows: Rows, readouts: Readouts
) -> tuple[jax.Array, Readouts, dict[str, jax.Array]]:
    """As `read_hidden`, and the model's auxiliary sums, which training may add to its loss."""
    hidden, _, aux = apply(params, rows, sources=readouts.source)
    return hidden, readouts._replace(source=None), aux


def _taken(hidden: jax.Array, readouts: Readouts) -> jax.Array:
    return hidden if readouts.source is None else take_sources(hidden, readouts.source)


def token_logprobs(
    hidden: jax.Array,
    head: jax.Array | Head,
    readouts: Readouts,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    max_logits: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probability of each readout's target given the hidden state at its source.

    log p(target) = z[target] - logsumexp(z),  z = logits(hidden[source], head) / temperature

    Computed in chunks along M; the backward pass computes the logits again instead of keeping them.  Under a mesh with
    axes `data`, `fsdp`, `tensor` the vocabulary work runs inside `shard_map`: the head is gathered over `fsdp` once,
    its gradient accumulated locally in at least float32 and reduce-scattered once; the vocabulary stays split over
    `tensor`.

    Args:
      hidden: [B, T, D] final hidden states (after the last norm), in the compute dtype; or [B, M, D], those of the
        readouts, whose source is then None.
      head: [D, V] in the same dtype, or one whose logits are scaled or capped.
      readouts: fields [B, M].
      temperature: divides the logits; top-k and top-p never enter log-probs.
      entropy: also return the entropy of the distribution, -sum_v p_v log p_v.
      max_logits: logits that a device may hold at a time; sets the chunk length.  None: what suits the platform.

    Returns:
      (logprobs [B, M], entropy [B, M] or None) in nats, in at least float32, 0 where the mask is False.
    """
    kernel, made, max_logits = _checked(hidden, head, max_logits)
    taken = _taken(hidden, readouts)
    logprobs, entropies = _logprobs(taken, kernel, readouts.target, made, float(temperature), entropy, max_logits)
    logprobs = jnp.where(readouts.mask, logprobs, 0)
    return logprobs, (jnp.where(readouts.mask, entropies, 0) if entropy else None)


def _checked(hidden: jax.Array, head: jax.Array | Head, max_logits: int | None) -> tuple[jax.Array, Any, int]:
    """The head's kernel and what is made of its logits, and how many of these a device may hold."""
    kernel, made = parts(head)
    if hidden.ndim != 3 or kernel.ndim != 2 or hidden.shape[-1] != kernel.shape[0]:
        raise ValueError(f"hidden is [B, T, D] and head [D, V]; got {hidden.shape} and {kernel.shape}")
    return kernel, made, max_logits or _MAX_LOGITS.get(platform(), _ACCELERATOR_MAX_LOGITS)


# The vocabulary work has its own derivative, for three reasons: the backward pass reuses the forward's logsumexp (and
# its logits, where one chunk holds them all: a chunk is held in the backward pass anyway, which comes right after), the
# head's gradient is accumulated over chunks in float32 though the head be bfloat16, and each collective is explicit.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _logprobs(taken, head, target, made, temperature, entropy, max_logits):
    return _forward(taken, head, target, made, temperature, entropy, max_logits)[0]


def _forward(taken, head, target, made, temperature, entropy, max_logits):
    shards = VocabularyShards(taken.shape, head.shape)
    length = shards.chunk_length(max_logits)
    keep = length >= taken.shape[1]

    def local(taken, head, target):
        head = shards.gather_head(head)
        offset = shards.vocabulary_offset(head)

        def chunk(_, inputs):
            h, t = inputs
            z = logits(h, Head(head, made)) / temperature
            return None, (*((z,) if keep else ()), *shards.of_logits(z, t - offset, entropy))

        return over_chunks(chunk, None, (taken, target), length)[1]

    outs = ("logits",) * keep + ("rows",) * (3 if entropy else 2)
    out = shards.run(local, ("rows", "head", "rows"), outs)(taken, head, target)
    kept, (logprobs, lse, *entropies) = out[:keep], out[keep:]
    entropies = entropies[0] if entropy else None
    return (logprobs, entropies), (taken, head, target, lse, entropies, kept)


def _backward(made, temperature, entropy, max_logits, residuals, cotangents):
    taken, head, target, lse, entropies, kept = residuals
    keep = len(kept)
    shards = VocabularyShards(taken.shape, head.shape)
    per_readout = (target, lse, cotangents[0]) + ((entropies, cotangents[1]) if entropy else ())

    def local(taken, head_shard, *per_readout):
        kept, per_readout = per_readout[:keep], per_readout[keep:]
        head = shards.gather_head(head_shard)
        offset = shards.vocabulary_offset(head)

        def chunk(d_head, inputs):
            h, t, lse, g, *of_entropy = inputs
            z = kept[0] if keep else logits(h, Head(head, made)) / temperature
            logp = z - lse[..., None]
            p = jnp.exp(logp)
            d_z = jnp.where(hits(t, p.shape[-1], offset), g[..., None], 0) - g[..., None] * p
            if entropy:  # dH / dz_v = -p_v (log p_v + H)
                value, g_entropy = of_entropy
                d_z -= g_entropy[..., None] * p * (logp + value[..., None])
            if made is not None:
                d_z = sloped(d_z, made.slope(z * temperature)) * made.scale
            d_h, more = shards.of_products(d_z / temperature, h, head)
            return d_head + more, d_h

        zeros = jnp.zeros(head.shape, at_least_float32(head).dtype)
        d_head, d_h = over_chunks(chunk, zeros, (taken, *per_readout), shards.chunk_length(max_logits))
        return d_h, shards.scatter_head(d_head).astype(head.dtype)

    ins = ("rows", "head", *("logits",) * keep, *("rows",) * len(per_readout))
    d_taken, d_head = shards.run(local, ins, ("rows", "head"))(taken, head, *kept, *per_readout)
    return d_taken, d_head, None


_logprobs.defvjp(_forward, _backward)


def weighted_logprobs(
    hidden: jax.Array,
    head: jax.Array | Head,
    readouts: Readouts,
    weights: jax.Array,
    *,
    entropy: bool = False,
    max_logits: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The weighted sum of `token_logprobs`, for a loss that is no more than that: its gradient costs less.

        S = sum_t w_t log p(target_t)

    What S asks of a logit, w_t (1[target] - p), is known as soon as the logit is: gradients are made beside the values,
    a chunk at a time, and the backward pass only scales them.  No logit is made again and the head is gathered once.

    Args:
      hidden, head, readouts, entropy, max_logits: as `token_logprobs` takes them.
      weights: [B, M], of which no gradient is taken; only those whose mask is True count.

    Returns:
      (S, log-probs [B, M], entropy [B, M] or None), as `token_logprobs` gives them; S alone has a gradient.
    """
    kernel, made, max_logits = _checked(hidden, head, max_logits)
    taken, weights = _taken(hidden, readouts), jnp.where(readouts.mask, weights, 0)
    total, *per_readout = _weighted(taken, kernel, readouts.target, weights, made, entropy, max_logits)
    logprobs, entropies = (
        x if x is None else jax.lax.stop_gradient(jnp.where(readouts.mask, x, 0)) for x in per_readout
    )
    return total, logprobs, entropies


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _weighted(taken, head, target, weights, made, entropy, max_logits):
    logprobs, entropies = _forward(taken, head, target, made, 1.0, entropy, max_logits)[0]
    return _dot(weights, logprobs), logprobs, entropies


def _weighted_forward(taken, head, target, weights, made, entropy, max_logits):
    shards = VocabularyShards(taken.shape, head.shape)

    def local(taken, head, target, weights):
        head = shards.gather_head(head)
        offset = shards.vocabulary_offset(head)

        def chunk(d_head, inputs):
            h, t, w = inputs
            z = logits(h, Head(head, made))
            logprob, lse, *entropies = shards.of_logits(z, t - offset, entropy)
            w = w[..., None].astype(z.dtype)
            d_z = jnp.where(hits(t, z.shape[-1], offset), w, 0) - w * jnp.exp(z - lse[..., None])
            if made is not None:
                d_z = sloped(d_z, made.slope(z)) * made.scale
            d_h, more = shards.of_products(d_z, h, head)
            return d_head + more, (d_h, logprob, *entropies)

        zeros = jnp.zeros(head.shape, at_least_float32(head).dtype)
        d_head, out = over_chunks(chunk, zeros, (taken, target, weights), shards.chunk_length(max_logits))
        return shards.scatter_head(d_head), *out

    run = shards.run(local, ("rows", "head", "rows", "rows"), ("head", "rows", "rows") + ("rows",) * entropy)
    d_head, d_taken, logprobs, *entropies = run(taken, head, target, weights)
    found = _dot(weights, logprobs), logprobs, entropies[0] if entropy else None
    return found, (d_taken, d_head, jnp.zeros((), head.dtype))


def _weighted_backward(made, entropy, max_logits, residuals, cotangents):
    d_taken, d_head, like = residuals
    scale = cotangents[0]
    return (scale * d_taken).astype(d_taken.dtype), (scale * d_head).astype(like.dtype), None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _dot(weights, logprobs):
    return jnp.sum(jnp.where(weights != 0, weights * logprobs, 0))


def scalar_readout(hidden: jax.Array, kernel: jax.Array, readouts: Readouts) -> jax.Array:
    """A scalar head (score or value) at each readout's source: w^T hidden[source].

    Args:
      hidden: [B, T, D], or [B, M, D] as in `token_logprobs`.
      kernel: [D, 1].
      readouts: fields [B, M].

    Returns:
      [B, M] in at least float32 (the head is computed in it), 0 where the mask is False.
    """
    if hidden.ndim != 3 or kernel.shape != (hidden.shape[-1], 1):
        raise ValueError(f"hidden is [B, T, D] and kernel [D, 1]; got {hidden.shape} and {kernel.shape}")
    taken = at_least_float32(_taken(hidden, readouts))
    values = jnp.sum(taken * kernel[:, 0].astype(taken.dtype), axis=-1)
    return jnp.where(readouts.mask, values, 0)


def completion_sums(values: jax.Array, readouts: Readouts, num_completions: int) -> jax.Array:
    """Sums of the readouts' values over each completion, [B, M] -> [B, C]; masked readouts are left out.

    >>> one = jnp.ones((1, 3), int)
    >>> r = Readouts(one, one, jnp.array([[0, 1, 1]]), jnp.array([[True, True, True]]))
    >>> print(completion_sums(jnp.array([[1.0, 2.0, 3.0]]), r, 2))
    [[1. 5.]]
    """
    values = at_least_float32(values)
    member = (readouts.completion[:, None, :] == jnp.arange(num_completions)[:, None]) & readouts.mask[:, None, :]
    return jnp.sum(jnp.where(member, values[:, None, :], 0), axis=-1)


def pairs(values: jax.Array, completions: Completions) -> dict[str, jax.Array]:
    """Per-completion values by pair, [B, C] -> {"chosen": [B, C'], "rejected": [B, C'], "mask": bool [B, C']}.

    C' = (C + 1) // 2 pair slots.  Which completion is which is read from `pair` and `role`, never from the order.
    A slot is masked, and its values 0, where one of the two is absent.
    """
    slots = jnp.arange((completions.pair.shape[1] + 1) // 2)
    in_slot = (completions.pair[:, None, :] == slots[:, None]) & completions.mask[:, None, :]
    chosen = in_slot & (completions.role == CHOSEN)[:, None, :]
    rejected = in_slot & (completions.role == REJECTED)[:, None, :]
    mask = chosen.any(axis=-1) & rejected.any(axis=-1)

    def pick(member):
        return jnp.sum(jnp.where(member & mask[..., None], values[:, None, :], 0), axis=-1)

    return {"chosen": pick(chosen), "rejected": pick(rejected), "mask": mask}

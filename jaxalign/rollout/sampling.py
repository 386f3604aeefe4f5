"""How completions are sampled: temperature, top-k, top-p, their length, and a key for every token."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.ops.precision import at_least_float32
from jaxalign.types import Array


class Sampling(NamedTuple):
    """How completions are sampled.  Decoding is compiled for it: it is a static argument there."""

    temperature: float  # 0 always takes the likeliest token
    max_new_tokens: int  # of a completion, its stop token included
    top_k: int = 0  # samples among the k likeliest tokens; 0: off
    top_p: float = 1.0  # samples among the likeliest tokens that make up this share; 1: off
    num_tokens: int | None = None  # ids from here on are no tokens, and are not sampled; None: all are

    @classmethod
    def of(cls, rollout: Any, **given: float | None) -> Sampling:
        """The configuration's `rollout` section, but for the values that are given and not None.

        Raises:
          InputError: a value that is out of its bounds.

        >>> from jaxalign.config import defaults
        >>> Sampling.of(defaults("ppo").rollout, temperature=0, top_k=None)
        Sampling(temperature=0.0, max_new_tokens=128, top_k=0, top_p=1.0, num_tokens=None)
        """
        from jaxalign.ranges import check_flags  # here: sampling itself needs no configuration

        values = {name: getattr(rollout, name) if given.get(name) is None else given[name] for name in FIELDS}
        check_flags(**values)
        return cls(*(kind(values[name]) for name, kind in FIELDS.items()))

    def of_tokens(self, tokenizer: Any, vocab_size: int) -> Sampling:
        """The same, without ids that no token of the tokenizer has: a vocabulary may be padded beyond it.

        They have no text, and a reward or value model may have no vector of them.

        Args:
          tokenizer: of transformers.
          vocab_size: V of the model.
        """
        count = max(tokenizer.get_vocab().values()) + 1
        return self._replace(num_tokens=count) if count < vocab_size else self


FIELDS = {"temperature": float, "max_new_tokens": int, "top_k": int, "top_p": float}  # of `rollout`, and flags


def keep_tokens(logits: Array, num_tokens: int | None) -> Array:
    """Gives ids that are no tokens -inf.

    Args:
      logits: float [B, V].
      num_tokens: None keeps all.

    >>> keep_tokens(jnp.array([[3.0, 1.0, 2.0]]), 2).tolist()
    [[3.0, 1.0, -inf]]
    """
    chex.assert_rank(logits, 2)
    if num_tokens is None:
        return logits
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < num_tokens, logits, -jnp.inf)


def keep_top_k(logits: Array, k: int) -> Array:
    """Keeps the k likeliest tokens of each row; the others get -inf.

    Tokens that tie with the k-th are kept too, as in transformers' `TopKLogitsWarper`.

    Args:
      logits: float [B, V].
      k: 0 keeps all.

    >>> keep_top_k(jnp.array([[3.0, 1.0, 2.0]]), 2).tolist()
    [[3.0, -inf, 2.0]]
    """
    chex.assert_rank(logits, 2)
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: Array, p: float) -> Array:
    """Keeps the smallest set of likeliest tokens whose probability reaches p; the others get -inf.

    The token that crosses p is kept, and so is every token that ties with the last one kept.
    Source: Holtzman et al. 2020 (arXiv:1904.09751), section 3.1.

    Args:
      logits: float [B, V]; -inf where a token is already excluded.
      p: in (0, 1]; 1 keeps all.

    >>> keep_top_p(jnp.log(jnp.array([[0.5, 0.2, 0.3]])), 0.6).tolist()
    [[-0.6931471824645996, -inf, -1.2039728164672852]]
    """
    chex.assert_rank(logits, 2)
    if p >= 1:
        return logits
    order = jnp.flip(jnp.sort(logits, axis=-1), -1)
    probs = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # probability of the likelier ones
    count = jnp.maximum(jnp.sum(before < p, axis=-1, keepdims=True), 1)
    least = jnp.take_along_axis(order, count - 1, axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


def sample(
    logits: Array,
    keys: Array,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    num_tokens: int | None = None,
) -> tuple[Array, Array]:
    """One token of each row, and its log-prob under the whole distribution at the stated temperature.

    The order is that of transformers: temperature, top-k, top-p.  The log-prob leaves top-k and top-p out, and
    counts ids that are no tokens, so that it is what a training forward computes.

    Args:
      logits: float [B, V].
      keys: random keys [B], one per row: no row's token depends on another row.
      temperature: 0 takes the likeliest token (the first of equals); its log-prob is then at temperature 1.
      top_k: 0 for all tokens.
      top_p: 1 for all tokens.
      num_tokens: ids from here on are not sampled; None: all may be.

    Returns:
      (tokens int32 [B], logprobs [B] in nats).
    """
    chex.assert_rank([logits, keys], [2, 1])
    logits = at_least_float32(logits)
    if temperature == 0:
        tokens = jnp.argmax(keep_tokens(logits, num_tokens), axis=-1)
    else:
        logits = logits / temperature
        kept = keep_tokens(logits, num_tokens)
        tokens = jax.vmap(jax.random.categorical)(keys, keep_top_p(keep_top_k(kept, top_k), top_p))
    tokens = tokens.astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def token_keys(key: Array, sample_ids: Array, position: Array | int) -> Array:
    """The key of each row's next token: fold_in(fold_in(key, sample id), position in the completion).

    It depends on nothing else: not on the row's slot, its neighbours, its padding or the mesh.

    Args:
      key: of the run, or of an iteration.
      sample_ids: int32 [B].
      position: 0 for a completion's first token; one for all rows, or int32 [B].

    Returns:
      Keys [B].
    """
    chex.assert_rank(sample_ids, 1)
    position = jnp.broadcast_to(position, sample_ids.shape)
    return jax.vmap(lambda i, p: jax.random.fold_in(jax.random.fold_in(key, i), p))(sample_ids, position)

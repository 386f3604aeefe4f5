"""The structures every room passes around; each is a pytree and each field states its shape.

Dims: B batch rows, T row length, M readouts of a row, C completions of a row.  The data layer fills
these with numpy arrays, the steps receive them as jax arrays; this module imports neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax inside a step
Params = dict[str, Any]  # a plain nested dict of arrays

# Values of `Completions.role`.
CHOSEN = 0
REJECTED = 1
SINGLE = 2


class CausalByIndex(NamedTuple):
    """What rows promise: no token sees one that comes after it in the row, and among those that it sees positions count
    up with the index."""


class CausalByPosition(NamedTuple):
    """What rows promise: no token sees one of a later position, nor another of its own: pairs around their prompt."""


class Rows(NamedTuple):
    """Rows of tokens; each token sees one half-open interval of row indices.

    A padding token sees itself: an empty interval would average all keys without a word.
    """

    tokens: Array  # int32 [B, T]
    positions: Array  # int32 [B, T], the rotary position; explicit, so padding never shifts it
    attend_start: Array  # int32 [B, T], first row index this token sees
    attend_end: Array  # int32 [B, T], one past the last row index this token sees
    # What the layout promises, so that attention may leave keys out. It holds no arrays: to jax it is part of the
    # structure, known when a program is compiled. `data.promises.check_layout` finds rows that do not keep it.
    causal: CausalByIndex | CausalByPosition | tuple[()] = ()


class Readouts(NamedTuple):
    """The places where something is read from the hidden states: a log-prob, a value, a score."""

    source: Array | None  # int32 [B, M], row index of the hidden state that is read; None: those are at hand, [B, M, D]
    target: Array  # int32 [B, M], the token it predicts (0 and unused for scores)
    completion: Array  # int32 [B, M], number within the row of the completion it belongs to
    mask: Array  # bool [B, M], False for unused places


class Completions(NamedTuple):
    """The completions of each row and what is known of them."""

    pair: Array  # int32 [B, C], number within the row of the pair (or prompt) it belongs to
    role: Array  # int32 [B, C], CHOSEN, REJECTED or SINGLE
    weight: Array  # float32 [B, C], weight of the item in the loss, 1 unless the data says otherwise
    ref_logprob: Array  # float32 [B, C], summed reference log-prob in nats, 0 until attached
    score: Array  # float32 [B, C], a number from the data: margin of a pair, label, rating; else 0
    mask: Array  # bool [B, C], False for unused places


class Batch(NamedTuple):
    """What a training step is given."""

    rows: Rows
    readouts: Readouts
    completions: Completions
    record_ids: Array  # int32 [B, C], index into the dataset of each completion's record, -1 unused


class PolicyBatch(NamedTuple):
    """A batch for the policy-gradient step: rows of one completion or two, and their experience by readout."""

    batch: Batch
    old_logprobs: Array  # float32 [B, M], log-probs when the experience was collected, in nats
    ref_logprobs: Array  # float32 [B, M], log-probs under the reference, in nats
    old_values: Array | None  # float32 [B, M], value estimates when the experience was collected; None: no critic
    advantages: Array  # float32 [B, M]
    returns: Array | None  # float32 [B, M]; None where the estimator has none


class Terms(NamedTuple):
    """What a loss returns: per-item terms, reduced later as (sum, weight) and divided once."""

    loss: Array  # float [N] or [N, R], loss of each item
    weight: Array  # float, same shape as loss; 0 for unused items
    metrics: dict[str, tuple[Array, Array]]  # name -> (sum, weight), both scalars


class TrainState(NamedTuple):
    """All that a run's future depends on; the whole of it is checkpointed."""

    step: Array  # int32 [], optimizer updates attempted so far
    params: dict[str, Params]  # by role: "policy", "value", "reward"
    opt: dict[str, Any]  # optax state by role
    extra: dict[str, Array]  # whatever else influences a number: KL coefficient, running means
    data_cursor: Array  # int32 [], index of the next batch of the data stream

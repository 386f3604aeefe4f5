"""Losses on preference pairs by the difference of their log-ratios, and the table of all losses on pairs.

Notation: a = chosen log-ratio (policy minus reference, summed over the completion), b = rejected log-ratio,
D = a - b, s = logistic function.  `beta a` is the implicit reward of the chosen completion.  All have the arguments of
`sigmoid_loss`; what further ones are is said there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxalign.ops import losses_free as free
from jaxalign.ops import losses_sides as sides
from jaxalign.ops.log_ratios import Pair, by_token, log_ratios, pair_terms
from jaxalign.types import Terms

PreferenceLoss = Callable[..., Terms]  # (policy, ref, lengths, mask, *, beta, **options)


def sigmoid_loss(
    policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float, label_smoothing: float = 0.0
) -> Terms:
    """DPO, with the labels flipped at a stated rate where `label_smoothing` is not 0 (cDPO).

        loss = -(1 - eps) log s(beta D) - eps log s(-beta D)

    Sources: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; Mitchell 2023, "A note on DPO with noisy preferences",
    eq. 3.  TRL 1.16 ignores label smoothing here.

    Args:
      policy: {"chosen", "rejected"} [N], log-probs of the completions summed over their tokens, in nats.
      ref: the same under the reference; a constant, no gradient reaches it.
      lengths: {"chosen", "rejected"} [N], scored tokens; not used by this loss.
      mask: [N] bool, or the weights of the pairs; 0 leaves a pair out.
      beta: strength of the tie to the reference, per nat; positive.
      label_smoothing: eps, the share of labels taken to be wrong, in [0, 0.5).

    Returns:
      Terms with loss [N]; metrics as `log_ratios.pair_terms` says.

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(sigmoid_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [0.6931472]
    """
    del lengths
    ratios = log_ratios(policy, ref, mask)
    logits = beta * (ratios.chosen - ratios.rejected)
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)
    return pair_terms(loss, ratios, beta)


def sigmoid_norm_loss(policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float) -> Terms:
    """DPO on log-ratios averaged over a completion's tokens, so that long answers do not count for more.

        loss = -log s(beta (a / len_chosen - b / len_rejected))

    Source: Lambert et al. 2024 (arXiv 2411.15124, Tulu 3), with a beta of 5.

    >>> zero, one = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}, {"chosen": jnp.ones(1), "rejected": jnp.ones(1)}
    >>> print(sigmoid_norm_loss(zero, zero, one, jnp.array([True]), beta=5.0).loss)
    [0.6931472]
    """
    ratios = log_ratios(policy, ref, mask)
    chosen, rejected = by_token(ratios, lengths)
    return pair_terms(-jax.nn.log_sigmoid(beta * (chosen - rejected)), ratios, beta)


def ipo_loss(policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float, average: bool = True) -> Terms:
    """IPO: the log-ratio gap is pulled to 1 / (2 beta) and no further.

        average:  loss = (a / len_chosen - b / len_rejected - 1 / (2 beta))^2
        sum:      loss = (a - b - 1 / (2 beta))^2

    Source: Azar et al. 2023 (arXiv 2310.12036) eq. 17, with beta their tau.  The paper writes sums over sequences, as
    OpenRLHF computes; TRL 1.16 averages over tokens and reports that the authors confirmed that form.

    Args:
      policy, ref, mask: as `sigmoid_loss`.
      lengths: {"chosen", "rejected"} [N], scored tokens of each completion.
      beta: in units of 1 / nat, or tokens / nat where averaged.
      average: per token (TRL's form) or summed (the paper's).

    Returns:
      Terms with loss [N]; metrics as `log_ratios.pair_terms` says (rewards are of sums in both forms).

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(ipo_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [25.]
    """
    ratios = log_ratios(policy, ref, mask)
    chosen, rejected = by_token(ratios, lengths) if average else (ratios.chosen, ratios.rejected)
    return pair_terms(jnp.square(chosen - rejected - 1 / (2 * beta)), ratios, beta)


def hinge_loss(policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float) -> Terms:
    """A margin of 1 between the implicit rewards, and no gradient beyond it.

        loss = max(0, 1 - beta D)

    Sources: Zhao et al. 2023 (arXiv 2305.10425, SLiC-HF), whose margin is one of log-probs; on log-ratios as in Liu et
    al. 2023 (arXiv 2309.06657, RSO).

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(hinge_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [1.]
    """
    del lengths
    ratios = log_ratios(policy, ref, mask)
    return pair_terms(jax.nn.relu(1 - beta * (ratios.chosen - ratios.rejected)), ratios, beta)


def robust_loss(
    policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float, label_smoothing: float = 0.0
) -> Terms:
    """DPO's loss without the bias of labels that are wrong at a known rate: its mean over such labels is DPO's own.

        loss = (-(1 - eps) log s(beta D) + eps log s(-beta D)) / (1 - 2 eps)

    Source: Chowdhury et al. 2024 (arXiv 2403.00409, rDPO).  It is not bounded below: a pair that is sure and
    right goes on being pushed.

    Args:
      policy, ref, lengths, mask, beta: as `sigmoid_loss`.
      label_smoothing: eps, the share of labels that are wrong, in [0, 0.5).

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(robust_loss(zero, zero, zero, jnp.array([True]), beta=0.1, label_smoothing=0.2).loss)
    [0.6931472]
    """
    del lengths
    ratios = log_ratios(policy, ref, mask)
    logits, eps = beta * (ratios.chosen - ratios.rejected), label_smoothing
    loss = (eps * jax.nn.log_sigmoid(-logits) - (1 - eps) * jax.nn.log_sigmoid(logits)) / (1 - 2 * eps)
    return pair_terms(loss, ratios, beta)


def exo_pair_loss(
    policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float, label_smoothing: float = 1e-3
) -> Terms:
    """EXO: the reverse KL from the policy's choice between the two to that of the labels, which DPO has forward.

        p = (s(beta D), s(-beta D));  loss = KL(p || (1 - eps, eps))

    Source: Ji et al. 2024 (arXiv 2402.00856) eq. 16, with their beta_pi = beta.

    Args:
      policy, ref, lengths, mask, beta: as `sigmoid_loss`.
      label_smoothing: eps, the share of labels taken to be wrong, in (0, 0.5): at 0 the KL is infinite.

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(exo_pair_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss.round(4))
    [2.7612]
    """
    del lengths
    ratios = log_ratios(policy, ref, mask)
    logits = beta * (ratios.chosen - ratios.rejected)
    eps = jnp.asarray(label_smoothing, logits.dtype)
    loss = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - jnp.log1p(-eps))
    loss += jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - jnp.log(eps))
    return pair_terms(loss, ratios, beta)


def discopop_loss(
    policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float, discopop_tau: float = 0.05
) -> Terms:
    """DiscoPOP, a blend that a language model found: logistic where a pair is wrong, exponential where it is right.

        m = s(beta D / tau);  loss = (1 - m) (-log s(beta D)) + m exp(-beta D)

    Source: Lu et al. 2024 (arXiv 2406.08414) eq. 5, with tau = 0.05.  The last term is computed as
    exp(log m - beta D), which stays finite for every D where tau is below 1.

    Args:
      policy, ref, lengths, mask, beta: as `sigmoid_loss`.
      discopop_tau: tau, how wide the blend is.

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(discopop_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [0.8465736]
    """
    del lengths
    ratios = log_ratios(policy, ref, mask)
    logits = beta * (ratios.chosen - ratios.rejected)
    exponential = jnp.exp(jax.nn.log_sigmoid(logits / discopop_tau) - logits)
    loss = exponential - jax.nn.sigmoid(-logits / discopop_tau) * jax.nn.log_sigmoid(logits)
    return pair_terms(loss, ratios, beta)


def dpop_loss(
    policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float, dpop_lambda: float = 50.0
) -> Terms:
    """DPO-Positive: DPO that pays where the chosen completion becomes less likely than under the reference.

        loss = -log s(beta (D - lambda max(0, -a)))

    Source: Pal et al. 2024 (arXiv 2402.13228, Smaug) eq. 3, with lambda 5 to 500.

    Args:
      policy, ref, lengths, mask, beta: as `sigmoid_loss`.
      dpop_lambda: lambda, the weight of a fall of the chosen completion beside the difference.

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(dpop_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [0.6931472]
    """
    del lengths
    ratios = log_ratios(policy, ref, mask)
    fall = jax.nn.relu(-ratios.chosen)
    loss = -jax.nn.log_sigmoid(beta * (ratios.chosen - ratios.rejected - dpop_lambda * fall))
    return pair_terms(loss, ratios, beta)


def rdpo_loss(
    policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float, rdpo_alpha: float = 0.01
) -> Terms:
    """R-DPO: a longer answer is taken to have been preferred for its length, in part, and is pushed less.

        loss = -log s(beta D + alpha (len_chosen - len_rejected))

    Source: Park et al. 2024 (arXiv 2403.19159): the reward that preferences show is less than theirs by alpha for each
    token.

    Args:
      policy, ref, mask, beta: as `sigmoid_loss`.
      lengths: {"chosen", "rejected"} [N], scored tokens of each completion.
      rdpo_alpha: alpha, reward for each token.

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(rdpo_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [0.6931472]
    """
    ratios = log_ratios(policy, ref, mask)
    by_length = rdpo_alpha * (lengths["chosen"] - lengths["rejected"])
    return pair_terms(-jax.nn.log_sigmoid(beta * (ratios.chosen - ratios.rejected) + by_length), ratios, beta)


# Every loss on pairs, by the name that `algorithm.loss` gives it.
PREFERENCE_LOSSES: Mapping[str, PreferenceLoss] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "exo_pair": exo_pair_loss,
    "discopop": discopop_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "dpop": dpop_loss,
    "rdpo": rdpo_loss,
    "nca_pair": sides.nca_pair_loss,
    "sppo_hard": sides.sppo_hard_loss,
    "apo_zero": sides.apo_zero_loss,
    "apo_down": sides.apo_down_loss,
    "simpo": free.simpo_loss,
    "orpo": free.orpo_loss,
    "sft": free.chosen_loss,
}
BY_TOKEN = ("sft",)  # means over chosen completions' tokens; all others are means over pairs

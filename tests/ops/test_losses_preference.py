"""Preference losses: hand numbers, Python loops, degenerate input."""

import functools
import inspect
import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.losses_preference import BY_TOKEN, PREFERENCE_LOSSES, ipo_loss, sigmoid_loss
from jaxalign.pair_losses import PAIR_LOSSES

N = 5


def logistic(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


# name -> (policy and reference log-probs, lengths, options) -> (loss, d loss / d chosen log-prob, d / d rejected)
def sigmoid_by_hand(a, b, len_c, len_r, beta, label_smoothing=0.0):
    d, e = beta * (a - b), label_smoothing
    slope = beta * (-(1 - e) * logistic(-d) + e * logistic(d))
    return (1 - e) * softplus(-d) + e * softplus(d), slope, -slope


def ipo_by_hand(a, b, len_c, len_r, beta, average=True):
    c, r = (len_c, len_r) if average else (1, 1)
    gap = a / c - b / r - 1 / (2 * beta)
    return gap**2, 2 * gap / c, -2 * gap / r


def of_difference(slope):
    """A loss of x = beta (a - b), and its derivative by x."""

    def by_hand(a, b, len_c, len_r, beta, **options):
        loss, d = slope(beta * (a - b), **options)
        return loss, beta * d, -beta * d

    return by_hand


@of_difference
def hinge_by_hand(x):
    return max(0.0, 1 - x), -1.0 if x < 1 else 0.0


@of_difference
def robust_by_hand(x, label_smoothing=0.0):
    e = label_smoothing
    loss = ((1 - e) * softplus(-x) - e * softplus(x)) / (1 - 2 * e)
    return loss, (-(1 - e) * logistic(-x) - e * logistic(x)) / (1 - 2 * e)


@of_difference
def exo_by_hand(x, label_smoothing=1e-3):
    """The sum over both outcomes, p log(p / q)."""
    e, p, not_p = label_smoothing, logistic(x), logistic(-x)
    log_odds = (-softplus(-x) - math.log(1 - e)) - (-softplus(x) - math.log(e))
    loss = p * (-softplus(-x) - math.log(1 - e)) + not_p * (-softplus(x) - math.log(e))
    return loss, p * not_p * log_odds  # the derivatives of the logs cancel


@of_difference
def discopop_by_hand(x, discopop_tau=0.05):
    m, slope = logistic(x / discopop_tau), logistic(x / discopop_tau) * logistic(-x / discopop_tau) / discopop_tau
    exponential = math.exp(-x - softplus(-x / discopop_tau))  # m exp(-x)
    slope_of_it = exponential * (logistic(-x / discopop_tau) / discopop_tau - 1)
    loss = logistic(-x / discopop_tau) * softplus(-x) + exponential
    assert x < -30 or math.isclose(loss, (1 - m) * softplus(-x) + m * math.exp(-x), rel_tol=1e-9)
    return loss, slope_of_it - slope * softplus(-x) - logistic(-x / discopop_tau) * logistic(-x)


def sigmoid_norm_by_hand(a, b, len_c, len_r, beta):
    x = beta * (a / len_c - b / len_r)
    return softplus(-x), -beta * logistic(-x) / len_c, beta * logistic(-x) / len_r


def nca_by_hand(a, b, len_c, len_r, beta):
    a, b = beta * a, beta * b
    loss = softplus(-a) + softplus(a) / 2 + softplus(b) / 2
    return loss, beta * (logistic(a) / 2 - logistic(-a)), beta * logistic(b) / 2


def sppo_by_hand(a, b, len_c, len_r, beta):
    return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2, 2 * a - 1 / beta, 2 * b + 1 / beta


def apo_zero_by_hand(a, b, len_c, len_r, beta):
    a, b = beta * a, beta * b
    return logistic(-a) + logistic(b), -beta * logistic(a) * logistic(-a), beta * logistic(b) * logistic(-b)


def apo_down_by_hand(a, b, len_c, len_r, beta):
    a, x = beta * a, beta * (a - b)
    pull = beta * logistic(x) * logistic(-x)
    return logistic(a) + logistic(-x), beta * logistic(a) * logistic(-a) - pull, pull


def dpop_by_hand(a, b, len_c, len_r, beta, dpop_lambda=50.0):
    x = beta * (a - b - dpop_lambda * max(0.0, -a))
    pull = beta * logistic(-x)
    return softplus(-x), -pull * (1 + dpop_lambda * (a < 0)), pull


def rdpo_by_hand(a, b, len_c, len_r, beta, rdpo_alpha=0.01):
    x = beta * (a - b) + rdpo_alpha * (len_c - len_r)
    return softplus(-x), -beta * logistic(-x), beta * logistic(-x)


def simpo_by_hand(a, b, len_c, len_r, beta, simpo_gamma=0.5):
    x = beta * (a / len_c - b / len_r) - simpo_gamma
    return softplus(-x), -beta * logistic(-x) / len_c, beta * logistic(-x) / len_r


def orpo_by_hand(a, b, len_c, len_r, beta):
    """By probabilities, not their logs; the derivative of log(p / (1 - p)) by log p is 1 / (1 - p), and 0 at p = 1."""
    (x, slope_x, y, slope_y) = (f for mean in (a / len_c, b / len_r) for f in odds_by_hand(mean))
    pull = beta * logistic(y - x)
    return beta * softplus(y - x), -pull * slope_x / len_c, pull * slope_y / len_r


def odds_by_hand(mean):
    not_p = -math.expm1(min(mean, -1e-6))
    return min(mean, -1e-6) - math.log(not_p), 1 / not_p if mean < -1e-6 else 0.0


def sft_by_hand(a, b, len_c, len_r, beta):
    return -a / len_c, -1 / len_c, 0.0


BY_HAND = {
    "sigmoid": sigmoid_by_hand,
    "ipo": ipo_by_hand,
    "hinge": hinge_by_hand,
    "robust": robust_by_hand,
    "exo_pair": exo_by_hand,
    "discopop": discopop_by_hand,
    "sigmoid_norm": sigmoid_norm_by_hand,
    "dpop": dpop_by_hand,
    "rdpo": rdpo_by_hand,
    "nca_pair": nca_by_hand,
    "sppo_hard": sppo_by_hand,
    "apo_zero": apo_zero_by_hand,
    "apo_down": apo_down_by_hand,
    "simpo": simpo_by_hand,
    "orpo": orpo_by_hand,
    "sft": sft_by_hand,
}
FREE = ("simpo", "orpo", "sft")  # of the policy's log-probs
MORE = {
    "sigmoid": {"label_smoothing": 0.2},
    "ipo": {"average": False},
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 0.2},
    "discopop": {"discopop_tau": 0.5},
    "dpop": {"dpop_lambda": 5.0},
    "rdpo": {"rdpo_alpha": 0.5},
    "simpo": {"simpo_gamma": 1.2},
}
OPTIONS = [(name, {}) for name in BY_HAND] + list(MORE.items())
# At policy = reference and beta 0.1, as TRL 1.16 has them.
AT_START = {
    "sigmoid": 0.693147, "hinge": 1, "ipo": 25, "exo_pair": 2.761231, "nca_pair": 1.386294, "robust": 0.693147,
    "sppo_hard": 50, "apo_zero": 1, "apo_down": 1, "discopop": 0.846574, "sigmoid_norm": 0.693147,
    "dpop": 0.693147, "rdpo": 0.693147,
}  # fmt: skip


@functools.partial(jax.jit, static_argnames=("name", "options"))
def evaluate(policy, ref, lengths, mask, beta, name, options):
    """Weighted sum of the losses, its gradient, the terms."""

    def scalar(policy):
        terms = PREFERENCE_LOSSES[name](policy, ref, lengths, mask, beta=beta, **dict(options))
        return jnp.sum(terms.loss * terms.weight), terms

    return jax.grad(scalar, has_aux=True)(policy)


def pair(chosen, rejected):
    return {"chosen": jnp.asarray(chosen), "rejected": jnp.asarray(rejected)}


logprob = st.floats(-200, 0, allow_subnormal=False)  # XLA takes those for 0


@st.composite
def batches(draw):
    columns = [[draw(logprob) for _ in range(N)] for _ in range(4)]
    lengths = [[draw(st.integers(1, 30)) for _ in range(N)] for _ in range(2)]
    mask = [draw(st.booleans()) for _ in range(N)]
    return columns, lengths, mask, draw(st.sampled_from([0.01, 0.1, 0.5, 2.0]))


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda x: str(x))
@hypothesis.given(batches())
@hypothesis.settings(max_examples=15, deadline=None)
def test_equals_a_loop(name, options, case):
    """Values, gradients and metrics, in float64 to 1e-12; masked pairs hold NaN."""
    (pc, pr, rc, rr), (lc, lr), mask, beta = case
    with jax.enable_x64(True):
        hide = lambda x: jnp.where(jnp.array(mask), jnp.array(x, jnp.float64), jnp.nan)  # noqa: E731
        gradient, terms = evaluate(
            pair(hide(pc), hide(pr)),
            pair(hide(rc), hide(rr)),
            pair(lc, lr),
            jnp.array(mask),
            beta,
            name,
            tuple(options.items()),
        )
        for i in range(N):
            if mask[i]:
                a, b = (pc[i], pr[i]) if name in FREE else (pc[i] - rc[i], pr[i] - rr[i])
                assert terms.weight[i] == (lc[i] if name == "sft" else 1)
                loss, d_chosen, d_rejected = BY_HAND[name](a, b, lc[i], lr[i], beta, **options)
            else:
                loss = d_chosen = d_rejected = 0.0
            d_chosen, d_rejected = (d * float(terms.weight[i]) for d in (d_chosen, d_rejected))
            np.testing.assert_allclose(terms.loss[i], loss, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(gradient["chosen"][i], d_chosen, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(gradient["rejected"][i], d_rejected, rtol=1e-12, atol=1e-13)
        kept = [i for i in range(N) if mask[i]]
        ratios = [(pc[i] - rc[i], pr[i] - rr[i]) for i in range(N)]
        if name in FREE:
            ratios = [(pc[i], pr[i]) if name == "sft" else (pc[i] / lc[i], pr[i] / lr[i]) for i in range(N)]
        of = {
            "rewards/chosen": lambda i: beta * ratios[i][0],
            "rewards/rejected": lambda i: beta * ratios[i][1],
            "rewards/margins": lambda i: beta * (ratios[i][0] - ratios[i][1]),
            "rewards/accuracies": lambda i: float(ratios[i][0] - ratios[i][1] > 0),
            "rewards/ties": lambda i: float(ratios[i][0] - ratios[i][1] == 0),
            "logps/chosen": lambda i: pc[i],
            "logps/rejected": lambda i: pr[i],
            "dpo/gradient_weight": lambda i: beta * logistic(-beta * (ratios[i][0] - ratios[i][1])),
        }
        assert set(terms.metrics) == set(of)
        for metric, value in of.items():
            total, weight = terms.metrics[metric]
            assert weight == len(kept)
            np.testing.assert_allclose(total, sum(map(value, kept)), rtol=1e-12, atol=1e-11)


def test_every_loss_has_a_loop_and_its_options_are_the_config_s():
    assert BY_HAND.keys() == PREFERENCE_LOSSES.keys() == PAIR_LOSSES.keys() == AT_START.keys() | set(FREE)
    assert tuple(name for name, one in PAIR_LOSSES.items() if one.reference is False) == FREE
    assert BY_TOKEN == ("sft",)
    for name, function in PREFERENCE_LOSSES.items():
        options = tuple(inspect.signature(function).parameters)[5:]  # after policy, ref, lengths, mask, beta
        assert options == PAIR_LOSSES[name].fields == tuple(MORE.get(name, {})), name


@pytest.mark.parametrize(("name", "at_start"), AT_START.items())
def test_loss_where_policy_equals_reference(name, at_start):
    logprobs = pair([-3.0, -40.0], [-5.0, -1.0])
    _, terms = evaluate(logprobs, logprobs, pair([3, 40], [3, 40]), jnp.ones(2, bool), 0.1, name, ())
    np.testing.assert_allclose(terms.loss, [at_start] * 2, rtol=1e-6)
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert terms.metrics[metric][0] == 0
    assert terms.metrics["rewards/ties"][0] == 2  # nothing is ranked yet, rightly or wrongly
    np.testing.assert_allclose(terms.metrics["dpo/gradient_weight"][0] / 2, 0.05, rtol=1e-6)


def test_trap_label_smoothing_is_honoured():
    """TRL 1.16's sigmoid ignores it; at eps = 1/2 both labels weigh the same and nothing pulls at a tie."""
    policy, ref, ones = pair([-1.0], [-3.0]), pair([-2.0], [-2.0]), pair([1], [1])
    loss = lambda eps: evaluate(policy, ref, ones, jnp.ones(1, bool), 1.0, "sigmoid", (("label_smoothing", eps),))  # noqa: E731
    np.testing.assert_allclose(loss(0.0)[1].loss, [softplus(-2)], rtol=1e-6)
    np.testing.assert_allclose(loss(0.1)[1].loss, [0.9 * softplus(-2) + 0.1 * softplus(2)], rtol=1e-6)
    assert loss(0.0)[0]["chosen"] < 0 < loss(0.4)[0]["chosen"]  # past the smoothed optimum the pull turns round
    with pytest.raises(TypeError):
        ipo_loss(policy, ref, ones, jnp.ones(1, bool), beta=1.0, label_smoothing=0.1)


def test_trap_ipo_averages_or_sums_as_stated():
    policy, ref, lengths = pair([-2.0], [-6.0]), pair([-4.0], [-5.0]), pair([2], [4])
    mask = jnp.ones(1, bool)
    average = evaluate(policy, ref, lengths, mask, 0.5, "ipo", (("average", True),))[1].loss
    total = evaluate(policy, ref, lengths, mask, 0.5, "ipo", (("average", False),))[1].loss
    np.testing.assert_allclose(average, [(2 / 2 + 1 / 4 - 1) ** 2], rtol=1e-6)
    np.testing.assert_allclose(total, [(2 + 1 - 1) ** 2], rtol=1e-6)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_trap_no_gradient_reaches_the_reference(name):
    policy, lengths = pair([-2.0], [-6.0]), pair([2], [4])

    def scalar(ref):
        return PREFERENCE_LOSSES[name](policy, ref, lengths, jnp.ones(1, bool), beta=0.1).loss.sum()

    chex.assert_trees_all_equal(jax.grad(scalar)(pair([-4.0], [-5.0])), pair([0.0], [0.0]))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_weights_scale_the_pairs(name):
    policy, ref, lengths = pair([-2.0, -1.0], [-6.0, -3.0]), pair([-4.0, -2.0], [-5.0, -2.0]), pair([2, 1], [4, 3])
    plain = evaluate(policy, ref, lengths, jnp.ones(2, bool), 0.1, name, ())[1]
    weighted = evaluate(policy, ref, lengths, jnp.array([3.0, 0.5]), 0.1, name, ())[1]
    np.testing.assert_array_equal(weighted.loss, plain.loss)
    np.testing.assert_array_equal(weighted.weight, plain.weight * jnp.array([3.0, 0.5]))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_degenerate_batches(name):
    """All masked, and with NaN in every place: zero loss, zero weight, zero gradient."""
    nothing = pair([jnp.nan] * 3, [jnp.inf] * 3)
    gradient, terms = evaluate(nothing, nothing, pair([0] * 3, [0] * 3), jnp.zeros(3, bool), 0.1, name, ())
    assert terms.loss.sum() == terms.weight.sum() == 0
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))
    assert all(total == weight == 0 for total, weight in terms.metrics.values())


def test_huge_margins_are_linear_not_infinite():
    far = pair([-1e6], [0.0])
    gradient, terms = evaluate(far, pair([0.0], [-1e6]), pair([1], [1]), jnp.ones(1, bool), 1.0, "sigmoid", ())
    np.testing.assert_allclose(terms.loss, [2e6])
    np.testing.assert_allclose(gradient["chosen"], [-1.0])


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda x: str(x))
def test_far_from_the_reference_all_is_finite(name, options):
    """Log-ratios of 1e4 either way, in float32: values as the loop has them, gradients finite."""
    far = [(a, b) for a in (-1e4, 0.0, 1e4) for b in (-1e4, 0.0, 1e4)]
    chosen, rejected = (list(side) for side in zip(*far, strict=True))
    ones = pair([1] * 9, [1] * 9)
    zeros = pair([0.0] * 9, [0.0] * 9)
    for beta in (0.1, 1.0):
        found = evaluate(pair(chosen, rejected), zeros, ones, jnp.ones(9, bool), beta, name, tuple(options.items()))
        gradient, terms = found
        by_hand = [BY_HAND[name](a, b, 1, 1, beta, **options)[0] for a, b in far]
        np.testing.assert_allclose(terms.loss, by_hand, rtol=1e-5, atol=1e-5)
        assert all(np.isfinite(side).all() for side in gradient.values())


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "robust", "apo_zero", "dpop", "rdpo"])
@hypothesis.given(st.tuples(*[st.floats(-1e3, 1e3)] * 4))
@hypothesis.settings(max_examples=15, deadline=None)
def test_a_better_chosen_or_a_worse_rejected_completion_never_costs(name, values):
    a, b, better, worse = values
    chosen, rejected = [a, max(a, better), a], [b, b, min(b, worse)]
    ones, zeros = pair([2] * 3, [3] * 3), pair([0.0] * 3, [0.0] * 3)
    loss = evaluate(pair(chosen, rejected), zeros, ones, jnp.ones(3, bool), 0.1, name, ())[1].loss
    assert loss[1] <= loss[0] and loss[2] <= loss[0]


def test_robust_is_dpo_s_loss_in_the_mean_over_labels_that_are_wrong_at_the_stated_rate():
    policy, zero, ones = pair([1.5, -0.5], [0.25, 3.0]), pair([0.0] * 2, [0.0] * 2), pair([1, 1], [1, 1])
    flipped = {"chosen": policy["rejected"], "rejected": policy["chosen"]}

    def loss(name, pairs, **options):
        return evaluate(pairs, zero, ones, jnp.ones(2, bool), 1.0, name, tuple(options.items()))[1].loss

    noisy = 0.7 * loss("robust", policy, label_smoothing=0.3) + 0.3 * loss("robust", flipped, label_smoothing=0.3)
    np.testing.assert_allclose(noisy, loss("sigmoid", policy), rtol=1e-5)


def test_trap_16_bit_logprobs_are_not_summed_in_16_bits():
    policy, ref = (pair(jnp.array([x], jnp.bfloat16), jnp.array([0.0], jnp.bfloat16)) for x in (-1000.0, -1004.0))
    terms = sigmoid_loss(policy, ref, pair([1], [1]), jnp.ones(1, bool), beta=0.1)
    assert terms.loss.dtype == jnp.float32
    np.testing.assert_allclose(terms.loss, [softplus(-0.4)], rtol=1e-6)


def test_shapes_are_checked():
    policy = pair(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(AssertionError):
        sigmoid_loss(policy, policy, policy, jnp.ones((2, 2), bool), beta=0.1)

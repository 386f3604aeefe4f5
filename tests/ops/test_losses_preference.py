"""Preference losses: hand numbers, Python loops, degenerate input."""

import functools
import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.losses_preference import PREFERENCE_LOSSES, ipo_loss, sigmoid_loss

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


BY_HAND = {"sigmoid": sigmoid_by_hand, "ipo": ipo_by_hand}
OPTIONS = [("sigmoid", {}), ("sigmoid", {"label_smoothing": 0.2}), ("ipo", {}), ("ipo", {"average": False})]


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
                a, b = pc[i] - rc[i], pr[i] - rr[i]
                loss, d_chosen, d_rejected = BY_HAND[name](a, b, lc[i], lr[i], beta, **options)
            else:
                loss = d_chosen = d_rejected = 0.0
            np.testing.assert_allclose(terms.loss[i], loss, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(gradient["chosen"][i], d_chosen, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(gradient["rejected"][i], d_rejected, rtol=1e-12, atol=1e-13)
        kept = [i for i in range(N) if mask[i]]
        of = {
            "rewards/chosen": lambda i: beta * (pc[i] - rc[i]),
            "rewards/rejected": lambda i: beta * (pr[i] - rr[i]),
            "rewards/margins": lambda i: beta * ((pc[i] - rc[i]) - (pr[i] - rr[i])),
            "rewards/accuracies": lambda i: float((pc[i] - rc[i]) - (pr[i] - rr[i]) > 0),
            "rewards/ties": lambda i: float((pc[i] - rc[i]) - (pr[i] - rr[i]) == 0),
            "logps/chosen": lambda i: pc[i],
            "logps/rejected": lambda i: pr[i],
            "dpo/gradient_weight": lambda i: beta * logistic(-beta * ((pc[i] - rc[i]) - (pr[i] - rr[i]))),
        }
        assert set(terms.metrics) == set(of)
        for metric, value in of.items():
            total, weight = terms.metrics[metric]
            assert weight == len(kept)
            np.testing.assert_allclose(total, sum(map(value, kept)), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("name", "at_start"), [("sigmoid", 0.693147), ("ipo", 25.0)])
def test_loss_where_policy_equals_reference(name, at_start):
    """The table of TRL 1.16 at beta 0.1."""
    logprobs = pair([-3.0, -40.0], [-5.0, -1.0])
    _, terms = evaluate(logprobs, logprobs, pair([3, 40], [5, 1]), jnp.ones(2, bool), 0.1, name, ())
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
    np.testing.assert_array_equal(weighted.weight, [3.0, 0.5])


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


def test_trap_16_bit_logprobs_are_not_summed_in_16_bits():
    policy, ref = (pair(jnp.array([x], jnp.bfloat16), jnp.array([0.0], jnp.bfloat16)) for x in (-1000.0, -1004.0))
    terms = sigmoid_loss(policy, ref, pair([1], [1]), jnp.ones(1, bool), beta=0.1)
    assert terms.loss.dtype == jnp.float32
    np.testing.assert_allclose(terms.loss, [softplus(-0.4)], rtol=1e-6)


def test_shapes_are_checked():
    policy = pair(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(AssertionError):
        sigmoid_loss(policy, policy, policy, jnp.ones((2, 2), bool), beta=0.1)

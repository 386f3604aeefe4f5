"""Objectives beside the plain mean: several terms, a mean over the batch, a sort of it; each against loops in numpy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import put_batch
from jaxalign.steps.loss_scale import LossScale
from jaxalign.steps.objective import Objective, Sums
from jaxalign.steps.sft import sft_objective
from jaxalign.steps.step import make_eval_step, make_train_step
from jaxalign.train.loop import make_evaluate
from jaxalign.types import TrainState
from tests.steps import worlds

ROWS = 64
SGD = optax.sgd(1.0)  # the update is minus the gradient
COEF, DECAY = 0.3, 0.9


def batch(seed=0):
    """Rows of two items, the better and the worse; of each fourth row none counts, which for 4 or 8 micro-batches
    makes whole ones of them empty."""
    rng = np.random.default_rng(seed)
    here = (np.arange(ROWS) % 4 != 1) & (rng.random(ROWS) < 0.8)
    kept = here[:, None] & (rng.random((ROWS, 2)) < 0.7)
    return {
        "x": rng.normal(size=(ROWS, 2, 8)),
        "pair": here * rng.uniform(0.5, 2, ROWS),
        "item": kept * rng.uniform(0.5, 2, (ROWS, 2)),
    }


def start(extra=None):
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(8, 4))), "v": jnp.asarray(rng.normal(size=4))}
    return TrainState(jnp.int32(0), {"policy": params}, {"policy": SGD.init(params)}, extra or {}, jnp.int32(0))


def scores(params, batch, to=jnp):
    """[B, 2]"""
    return to.tanh(batch["x"] @ params["w"]) @ params["v"]


def softplus(x):
    return np.log(1 + np.exp(x))


# Two terms, each with its own divisor.


def two_terms(params, frozen, extra, statistics, batch):
    s = scores(params["policy"], batch)
    pairs = jnp.sum(batch["pair"] * jax.nn.softplus(s[:, 1] - s[:, 0]))
    return Sums({"policy/pairs": pairs, "policy/items": jnp.sum(batch["item"] * s**2)})


TWO_TERMS = Objective(
    lambda batch: {"policy/pairs": jnp.sum(batch["pair"]), "policy/items": jnp.sum(batch["item"])},
    two_terms,
    coefs={"policy/items": COEF},
)


def two_terms_by_loop(params, batch, extra):
    s, pairs, items = scores(params, batch, np), 0, 0
    for row in range(ROWS):
        pairs += batch["pair"][row] * softplus(s[row, 1] - s[row, 0])
        for item in range(2):
            items += batch["item"][row, item] * s[row, item] ** 2
    return pairs / batch["pair"].sum() + COEF * items / batch["item"].sum(), {}


# An item's loss depends on the mean over the batch, which has no gradient, and on that of the batches before.


def item_sums(params, frozen, extra, batch):
    return {"total": jnp.sum(batch["item"] * scores(params["policy"], batch)), "weight": jnp.sum(batch["item"])}


def with_mean(params, frozen, extra, statistics, batch):
    s, mean = scores(params["policy"], batch), statistics["total"] / statistics["weight"]
    return Sums({"policy": jnp.sum(batch["item"] * jax.nn.sigmoid(extra["mean"] + mean - s))})


WITH_MEAN = Objective(
    lambda batch: {"policy": jnp.sum(batch["item"])},
    with_mean,
    statistics=item_sums,
    next_extra=lambda extra, found, sums: {
        "mean": DECAY * extra["mean"] + (1 - DECAY) * found["total"] / found["weight"],
        "loss": sums.terms["policy"],
    },
)


def with_mean_by_loop(params, batch, extra):
    s, weights, loss, mean = scores(params, batch, np), batch["item"], 0, 0
    for row in range(ROWS):
        mean += (weights[row] * s[row].real).sum() / weights.sum()
    for row in range(ROWS):
        for item in range(2):
            loss += weights[row, item] / (1 + np.exp(s[row, item] - extra["mean"] - mean))
    new = {"mean": DECAY * extra["mean"] + (1 - DECAY) * mean, "loss": loss.real}
    return loss / weights.sum(), new


# The better items, sorted, against the worse ones, sorted.


def sort_both(items, frozen, extra, statistics, batch):
    here = batch["pair"] > 0
    better, worse = (jnp.sort(jnp.where(here, items["policy"][:, i], jnp.inf)) for i in range(2))
    gap = jnp.where(jnp.isfinite(better), worse, 0) - jnp.where(jnp.isfinite(better), better, 0)
    loss = jnp.where(jnp.isfinite(better), jax.nn.softplus(gap), 0)
    return Sums({"policy": jnp.sum(loss)}, {"gap": (-jnp.sum(gap), jnp.sum(here))})


SORTED = Objective(
    lambda batch: {"policy": jnp.sum(batch["pair"] > 0)},
    sort_both,
    items=lambda params, frozen, extra, batch: {role: scores(own, batch) for role, own in params.items()},
)


def sorted_by_loop(params, batch, extra):
    s, here = scores(params, batch, np), batch["pair"] > 0
    better, worse = (sorted((x for x, there in zip(s[:, i], here, strict=True) if there), key=np.real) for i in (0, 1))
    return sum(softplus(w - b) for b, w in zip(better, worse, strict=True)) / here.sum(), {}


CASES = {
    "two terms": (TWO_TERMS, two_terms_by_loop, {}),
    "mean of the batch": (WITH_MEAN, with_mean_by_loop, {"mean": 0.2, "loss": 0.0}),
    "sorted": (SORTED, sorted_by_loop, {}),
}


@functools.cache
def by_loop(case):
    """Loss, gradient and new extra; a step of 1e-30 along the imaginary axis gives a derivative to the last digit."""
    _, loop, extra = CASES[case]
    params = jax.tree.map(np.asarray, start().params["policy"])
    loss, new = loop(jax.tree.map(lambda x: x + 0j, params), batch(), extra)
    gradient = {}
    for name, leaf in params.items():
        gradient[name] = np.zeros_like(leaf)
        for index in np.ndindex(leaf.shape):
            moved = {k: x + 0j for k, x in params.items()}
            moved[name][index] += 1e-30j
            gradient[name][index] = loop(moved, batch(), extra)[0].imag / 1e-30
    return loss.real, gradient, new


def stepped(case, accum, mesh=None, **options):
    """(metrics, gradient, extra) of one step."""
    objective, _, extra = CASES[case]
    state, data = start({name: jnp.float64(x) for name, x in extra.items()} | options.pop("extra", {})), batch()
    if mesh is not None:
        split = NamedSharding(mesh, PartitionSpec("fsdp"))
        places = jax.tree.map(lambda x: split if x.ndim == 2 else NamedSharding(mesh, PartitionSpec()), state)
        state, data = jax.device_put(state, places), put_batch(data, mesh)
    step = jax.jit(make_train_step(objective, {"policy": SGD}, grad_accum_steps=accum, **options))
    new, metrics = jax.block_until_ready(step(state, {}, data))
    return metrics, moved(state, new), new.extra


def moved(state, new):
    """By how much the policy did, downwards: the gradient."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params["policy"], new.params["policy"])


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("accum", [1, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_accumulation_and_devices_equal_the_loop(case, accum, devices, x64):
    if devices == 1:
        metrics, gradient, extra = stepped(case, accum)
    else:
        mesh = make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
        with jax.set_mesh(mesh):
            metrics, gradient, extra = stepped(case, accum, mesh)
    loss, expected, new = by_loop(case)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-9, atol=1e-9)
    chex.assert_trees_all_close(dict(extra), new, rtol=1e-9)
    assert np.abs(expected["w"]).max() > 1e-3 and metrics["skipped"] == 0


@pytest.mark.parametrize("case", CASES)
def test_a_scaled_loss_has_the_same_gradient(case, x64):
    plain, scaled = stepped(case, 4), stepped(case, 4, loss_scaling=True, extra=LossScale.initial())
    chex.assert_trees_all_close(scaled[1], plain[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scaled[0]["loss"], plain[0]["loss"], rtol=1e-12)


def test_each_term_is_logged(x64):
    metrics = stepped("two terms", 4)[0]
    data, parts = batch(), {name: float(metrics[f"term/policy/{name}"]) for name in ("pairs", "items")}
    np.testing.assert_allclose(metrics["loss"], parts["pairs"] + COEF * parts["items"], rtol=1e-12)
    np.testing.assert_allclose(metrics["weight"], data["pair"].sum() + data["item"].sum(), rtol=1e-12)
    assert "term/policy" not in stepped("sorted", 4)[0]


def test_one_role_of_two_has_two_terms(x64):
    def terms(params, frozen, extra, statistics, batch):
        sums = two_terms(params, frozen, extra, statistics, batch) if "policy" in params else Sums({})
        own = {"value": jnp.sum(batch["item"] * scores(params["value"], batch) ** 2)} if "value" in params else {}
        return sums._replace(terms=sums.terms | own)

    weights = lambda batch: TWO_TERMS.weights(batch) | {"value": jnp.sum(batch["item"])}  # noqa: E731
    one = start()
    both = lambda trees: dict.fromkeys(("policy", "value"), trees["policy"])  # noqa: E731
    state = one._replace(params=both(one.params), opt=both(one.opt))
    objective = TWO_TERMS._replace(weights=weights, terms=terms)
    new, metrics = make_train_step(objective, {"policy": SGD, "value": SGD}, grad_accum_steps=4)(state, {}, batch())
    loss, expected, _ = by_loop("two terms")
    np.testing.assert_allclose(metrics["loss/policy"], loss, rtol=1e-9)
    np.testing.assert_allclose(metrics["loss/value"], metrics["term/policy/items"], rtol=1e-12)
    chex.assert_trees_all_close(moved(state, new), expected, rtol=1e-9, atol=1e-9)
    assert "term/value" not in metrics and metrics["weight/value"] == batch()["item"].sum()
    found = make_eval_step(objective)(state.params, {}, {}, batch())
    assert {"loss/policy", "loss/value", "term/policy/items"} <= found.keys()
    np.testing.assert_allclose(np.sum(found["loss/policy"][0] / found["loss/policy"][1]), loss, rtol=1e-9)


def test_a_term_without_weight_leaves_the_others(x64):
    data = batch() | {"item": np.zeros((ROWS, 2))}
    new, metrics = make_train_step(TWO_TERMS, {"policy": SGD}, grad_accum_steps=4)(start(), {}, data)
    assert metrics["term/policy/items"] == 0 and metrics["loss"] == metrics["term/policy/pairs"] > 0
    assert metrics["update_norm"] > 0 and np.isfinite(new.params["policy"]["w"]).all()


@pytest.mark.parametrize("why", ["not finite", "no weight", "stopped"])
def test_extra_stays_where_nothing_is_updated(why, x64):
    step = make_train_step(WITH_MEAN, {"policy": SGD}, grad_accum_steps=4)
    extra = {"mean": jnp.float64(0.2), "loss": jnp.float64(0)} | ({"skip": jnp.array(True)} if why == "stopped" else {})
    data = batch()
    data["x"][0] *= np.nan if why == "not finite" else 1
    data["item"] *= why != "no weight"
    new, _ = step(start(extra), {}, data)
    chex.assert_trees_all_equal(new.extra, extra)


def test_extra_holds_what_the_run_began_with(x64):
    state = start({"mean": jnp.float64(0)})
    with pytest.raises(ValueError, match=r"changes \['loss'\] of a state's extra"):
        make_train_step(WITH_MEAN, {"policy": SGD})(state, {}, batch())


def test_evaluation_divides_each_term_once(x64):
    """Batches of unequal weights: the mean of their losses would be another number."""

    class Parts:
        def batch(self, index, *part):
            return jax.tree.map(lambda x: x[index * 16 : (index + 1) * 16], batch())

    mesh, step = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]), make_eval_step(TWO_TERMS)
    evaluate = make_evaluate(lambda state, *given: step(state.params, given[0], {}, given[1]), {}, Parts(), 4, mesh)
    found = evaluate(start())
    np.testing.assert_allclose(found["loss"], by_loop("two terms")[0], rtol=1e-12)
    expected = found["term/policy/pairs"] + COEF * found["term/policy/items"]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-12)
    whole = jax.jit(step)(start().params, {}, {}, batch())
    np.testing.assert_allclose(np.sum(whole["loss"][0] / whole["loss"][1]), found["loss"], rtol=1e-12)


@pytest.mark.parametrize("accum", [1, 4])
def test_auxiliary_sums_of_a_model_become_a_term_where_they_have_a_divisor(accum, x64):
    """The gradient of mean(scale^2) joins that of the loss; without a divisor the sums are left alone."""
    model = worlds.model("lm")

    def apply(params, rows, **options):
        hidden, cache, aux = model.apply(params, rows, **options)
        return hidden, cache, {**aux, "size": len(rows.tokens) * jnp.sum(params["norm"]["scale"] ** 2)}

    plain = sft_objective(apply, model.head, entropy=True)
    weights = lambda batch: plain.weights(batch) | {"policy/size": jnp.float64(len(batch.rows.tokens))}  # noqa: E731
    with_size, data = plain._replace(weights=weights, coefs={"policy/size": COEF}), worlds.data("sft")
    state, found = worlds.fresh("sft"), {}
    for name, objective in (("plain", plain), ("with size", with_size)):
        step = jax.jit(
            make_train_step(objective, {"policy": SGD}, grad_accum_steps=accum), compiler_options=worlds.COMPILER
        )
        new, metrics = step(state, {}, data)
        gradient = jax.tree.map(
            lambda a, b: np.asarray(a) - np.asarray(b), state.params["policy"], new.params["policy"]
        )
        found[name] = metrics, gradient
    worlds.assert_same((found["plain"][0], {"policy": found["plain"][1]}), "sft")
    scale = np.asarray(state.params["policy"]["norm"]["scale"])
    np.testing.assert_allclose(found["with size"][0]["term/policy/size"], np.sum(scale**2), rtol=1e-12)
    found["plain"][1]["norm"]["scale"] += COEF * 2 * scale
    chex.assert_trees_all_close(found["with size"][1], found["plain"][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("algorithm", worlds.ALGORITHMS)
def test_divisors_known_beforehand_are_the_sums_of_the_weights(algorithm, x64):
    """With junk in masked places, and none at all."""
    objective = worlds.objective(algorithm)
    for layout in ({"junk": 3}, {"packed": True, "junk": 4}, {"plan": [], "junk": 5}):
        data = worlds.data(algorithm, **layout)
        items = worlds.many(algorithm) if "plan" not in layout else ()
        records, tokens = (
            sum(e.weight * (len(e.completions[0]) if by_token else 1) for e in items) for by_token in (False, True)
        )
        for term, found in objective.weights(data).items():
            by_token = algorithm in ("sft", "ppo") or term == "policy/sft"
            np.testing.assert_allclose(found, tokens if by_token else records, rtol=1e-12)

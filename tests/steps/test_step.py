"""The train step on a linear model, where everything can be computed by hand."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.parallel.mesh import make_mesh
from jaxalign.steps.loss_scale import LossScale
from jaxalign.steps.objective import Objective, Sums
from jaxalign.steps.step import global_norm, make_eval_step, make_train_step
from jaxalign.types import TrainState


def squared(params, frozen, extra, statistics, batch):
    """Weighted squared error of a linear model; rows have several items, some of weight 0."""
    x, y, w = batch["x"], batch["y"], batch["w"]
    params = params["policy"]
    error = jnp.einsum("brd,d->br", x, params["kernel"].astype(x.dtype)) + params["bias"].astype(x.dtype) - y
    error = jnp.where(w != 0, error, 0).astype(jnp.promote_types(x.dtype, jnp.float32))
    total, weight = jnp.sum(w * jnp.square(error)), jnp.sum(w)
    return Sums({"policy": total}, {"error": (jnp.sum(w * error), weight)}, {"tokens": jnp.sum(w != 0)})


objective = Objective(lambda batch: {"policy": jnp.sum(batch["w"])}, squared)


def batch(rows=8, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.uniform(0.5, 2, (rows, 3)) * (rng.random((rows, 3)) < 0.6)
    return {
        "x": rng.normal(size=(rows, 3, 4)).astype(dtype),
        "y": rng.normal(size=(rows, 3)).astype(dtype),
        "w": w.astype(np.promote_types(dtype, np.float32)),
    }


def start(tx, dtype="float64", extra=None):
    params = {"kernel": jnp.arange(1, 5, dtype=dtype), "bias": jnp.ones((), dtype)}
    return TrainState(jnp.int32(0), {"policy": params}, {"policy": tx.init(params)}, extra or {}, jnp.int32(7))


def by_hand(params, batch):
    """Loss and gradient, in loops."""
    loss, weight, d_kernel, d_bias, error_sum = 0.0, 0.0, np.zeros(4), 0.0, 0.0
    for x, y, w in zip(batch["x"].reshape(-1, 4), batch["y"].ravel(), batch["w"].ravel(), strict=True):
        error = x @ np.asarray(params["kernel"]) + float(params["bias"]) - y
        loss, weight, error_sum = loss + w * error**2, weight + w, error_sum + w * error
        d_kernel, d_bias = d_kernel + 2 * w * error * x, d_bias + 2 * w * error
    return loss / weight, weight, {"kernel": d_kernel / weight, "bias": d_bias / weight}, error_sum / weight


@pytest.mark.parametrize("accum", [1, 2, 8])
def test_trap_accumulation_is_one_division(accum, x64):
    """Rows of unequal weight: the mean of micro-batch means would be another number."""
    tx = optax.sgd(0.1)
    state, data = start(tx), batch()
    new, metrics = jax.jit(make_train_step(objective, {"policy": tx}, grad_accum_steps=accum))(state, {}, data)
    old = state.params["policy"]
    loss, weight, gradient, error = by_hand(old, data)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
    np.testing.assert_allclose(metrics["weight"], weight, rtol=1e-12)
    np.testing.assert_allclose(metrics["error"], error, rtol=1e-12)
    assert metrics["tokens"] == np.count_nonzero(data["w"])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, old, gradient)
    chex.assert_trees_all_close(new.params["policy"], expected, rtol=1e-12)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(flat(gradient)), rtol=1e-12)
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm(flat(expected)), rtol=1e-12)
    np.testing.assert_allclose(metrics["update_norm"], 0.1 * np.linalg.norm(flat(gradient)), rtol=1e-10)
    assert metrics["skipped"] == 0
    assert new.step == 1 and new.data_cursor == 7


def test_micro_batches_are_every_nth_row(x64):
    """Micro-batch a holds the rows b with b % A == a, so that a device's rows stay its own."""
    seen = []

    def spy(*given):
        jax.debug.callback(lambda y: seen.append(sorted(y.tolist())), given[-1]["id"])
        return squared(*given)

    tx = optax.sgd(0.1)
    data = batch() | {"id": np.arange(8)}
    spied = objective._replace(terms=spy)
    jax.jit(make_train_step(spied, {"policy": tx}, grad_accum_steps=4))(start(tx), {}, data)
    jax.effects_barrier()
    assert sorted(seen) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_micro_batches_move_nothing_between_devices():
    tx = optax.sgd(0.1)
    mesh = make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    rows, whole = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), NamedSharding(mesh, PartitionSpec())
    state, data = jax.device_put(start(tx, "float32"), whole), jax.device_put(batch(32, np.float32), rows)
    step = jax.jit(make_train_step(objective, {"policy": tx}, grad_accum_steps=4), out_shardings=whole)
    hlo = step.lower(state, {}, data).compile().as_text()
    assert not re.search(r"all-to-all|all-gather|collective-permute", hlo)
    assert "all-reduce" in hlo


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_updates_are_masked(where):
    """Parameters and optimizer stay bit for bit; the step counts; the next good batch trains."""

    def poisoned(params, frozen, extra, statistics, data):
        sums = squared(params, frozen, extra, statistics, data)
        total = sums.terms["policy"]
        if where == "loss":
            total = total * jnp.where(data["bad"].any(), jnp.nan, 1)
        else:  # a finite loss with an infinite slope
            total = total + jnp.sqrt(jnp.where(data["bad"].any(), 0, 1) * jnp.square(params["policy"]["bias"]))
        return sums._replace(terms={"policy": total})

    tx = optax.adam(0.1)
    step = jax.jit(make_train_step(objective._replace(terms=poisoned), {"policy": tx}))
    state = start(tx, "float32")
    good, bad = (batch(dtype=np.float32) | {"bad": np.full(8, b)} for b in (False, True))
    state, metrics = step(state, {}, good)
    assert metrics["skipped"] == 0
    after, metrics = step(state, {}, bad)
    assert metrics["skipped"] == 1
    assert metrics["update_norm"] == 0
    chex.assert_trees_all_equal((after.params, after.opt), (state.params, state.opt))
    assert after.step == 2
    again, metrics = step(after, {}, good)
    assert metrics["skipped"] == 0 and metrics["update_norm"] > 0
    assert np.isfinite(global_norm(again.params))


def test_trap_a_batch_without_weight_says_so_and_moves_nothing():
    """Momentum alone would move the parameters; the loop sees weight 0 and stops with the reason."""
    tx = optax.adam(0.1)
    step = jax.jit(make_train_step(objective, {"policy": tx}))
    data = batch(dtype=np.float32)
    state, _ = step(start(tx, "float32"), {}, data)
    after, metrics = step(state, {}, data | {"w": 0 * data["w"]})
    assert metrics["weight"] == metrics["loss"] == metrics["skipped"] == 0
    chex.assert_trees_all_equal((after.params, after.opt), (state.params, state.opt))


def of_two_roles(params, frozen, extra, statistics, data):
    datas = {"policy": data, "value": data | {"w": 3 * data["w"] ** 2}}
    sums = {role: squared({"policy": own}, frozen, extra, statistics, datas[role]) for role, own in params.items()}
    metrics = sums["policy"].metrics if "policy" in sums else {}
    return Sums({role: x.terms["policy"] for role, x in sums.items()}, metrics, {"tokens": jnp.sum(data["w"] != 0)})


two_roles = Objective(lambda b: {"policy": jnp.sum(b["w"]), "value": jnp.sum(3 * b["w"] ** 2)}, of_two_roles)


def test_each_role_has_its_own_divisor_optimizer_and_metrics(x64):
    txs = {"policy": optax.sgd(0.1), "value": optax.sgd(1.0)}
    one, data = start(txs["policy"]), batch()
    params = {"policy": one.params["policy"], "value": jax.tree.map(lambda x: x + 1, one.params["policy"])}
    state = one._replace(params=params, opt={role: tx.init(params[role]) for role, tx in txs.items()})
    new, metrics = jax.jit(make_train_step(two_roles, txs, grad_accum_steps=2))(state, {}, data)
    for role, rate, weights in (("policy", 0.1, data["w"]), ("value", 1.0, 3 * data["w"] ** 2)):
        loss, weight, gradient, _ = by_hand(params[role], data | {"w": weights})
        np.testing.assert_allclose(metrics[f"loss/{role}"], loss, rtol=1e-12)
        np.testing.assert_allclose(metrics[f"weight/{role}"], weight, rtol=1e-12)
        expected = jax.tree.map(lambda p, g, r=rate: p - r * g, params[role], gradient)
        chex.assert_trees_all_close(new.params[role], expected, rtol=1e-12)
        assert {f"{m}/{role}" for m in ("grad_norm", "param_norm", "update_norm")} <= set(metrics)


def test_what_one_role_keeps_is_gone_before_the_next_begins():
    """Each role is asked for alone, and the parameters of the next wait for the gradients of those before."""
    tx, asked = optax.sgd(0.1), []

    def spy(params, *rest):
        asked.append(set(params))
        return of_two_roles(params, *rest)

    one = start(tx, "float32")
    params = {"policy": one.params["policy"], "value": one.params["policy"]}
    state = one._replace(params=params, opt={role: tx.init(own) for role, own in params.items()})
    step = make_train_step(two_roles._replace(terms=spy), {"policy": tx, "value": tx})
    equations = jax.make_jaxpr(step)(state, {}, batch(dtype=np.float32)).eqns
    assert asked == [{"policy"}, {"value"}]
    leaves = jax.tree.leaves(state.params)
    wait = next(i for i, e in enumerate(equations) if e.primitive.name == "optimization_barrier")
    assert len(equations[wait].invars) == len(leaves), "the value's parameters and the policy's gradients"
    products = [i for i, e in enumerate(equations) if e.primitive.name == "dot_general"]
    assert sum(i < wait for i in products) == 2 and sum(i > wait for i in products) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_are_pinned_and_the_step_compiles_once(dtype):
    """bfloat16 parameters and their optimizer state stay bfloat16, through donation and six steps."""
    traces = []

    def counted(*args):
        traces.append(1)
        return squared(*args)

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    of_counted = objective._replace(terms=counted)
    step = jax.jit(make_train_step(of_counted, {"policy": tx}, grad_accum_steps=2), donate_argnums=0)
    state = start(tx, dtype)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for i in range(6):
        state, metrics = jax.block_until_ready(step(state, {}, batch(dtype=np.float32, seed=i)))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
        assert all(metrics[m].dtype == jnp.float32 for m in ("loss", "grad_norm", "param_norm", "update_norm"))
    assert len(traces) <= 2  # the shapes of a micro-batch's sums, then the loop's body


def test_trap_bfloat16_gradients_are_added_in_float32():
    """512 micro-batches of gradient 1: in bfloat16 the sum would stop at 256."""

    def ones(params, frozen, extra, statistics, data):
        return Sums({"policy": jnp.sum(params["policy"] * data)})

    of_ones = Objective(lambda batch: {"policy": jnp.float32(1)}, ones)

    tx = optax.sgd(1.0)
    params = jnp.zeros((), jnp.bfloat16)
    state = TrainState(jnp.int32(0), {"policy": params}, {"policy": tx.init(params)}, {}, jnp.int32(0))
    _, metrics = jax.jit(make_train_step(of_ones, {"policy": tx}, grad_accum_steps=512))(
        state, {}, np.ones(512, jnp.bfloat16)
    )
    assert metrics["grad_norm"] == 512


def test_trap_update_norm_shows_bfloat16_weights_that_do_not_move():
    tx = optax.sgd(1e-6)
    step = jax.jit(make_train_step(objective, {"policy": tx}))
    assert step(start(tx, "bfloat16"), {}, batch(dtype=np.float32))[1]["update_norm"] == 0
    assert step(start(tx, "float32"), {}, batch(dtype=np.float32))[1]["update_norm"] > 0


def through_float16(params, frozen, extra, statistics, data):
    """A loss whose gradient passes through float16 times `data`."""
    kernel = params["policy"].astype(jnp.float16)
    return Sums({"policy": jnp.sum((kernel * data.astype(jnp.float16)).astype(jnp.float32))})


half = Objective(lambda batch: {"policy": jnp.float32(1)}, through_float16)


def scaled_state(tx, scale=LossScale.INITIAL):
    params = jnp.zeros(1, jnp.float32)
    extra = LossScale.initial() | {"loss_scale": jnp.float32(scale)}
    return TrainState(jnp.int32(0), {"policy": params}, {"policy": tx.init(params)}, extra, jnp.int32(0))


def test_trap_float16_gradients_do_not_underflow():
    """A gradient of 6e-8 times 0.25 is 0 in float16, unless the loss is scaled."""

    def tiny(params, frozen, extra, statistics, data):
        inner = (params["policy"].astype(jnp.float16) * jnp.float16(6e-8)).sum() * jnp.float16(0.25)
        return Sums({"policy": inner.astype(jnp.float32)})

    small = half._replace(terms=tiny)
    tx = optax.sgd(1.0)
    state = scaled_state(tx, 2.0**14)
    assert make_train_step(small, {"policy": tx})(state, {}, np.ones(1))[1]["grad_norm"] == 0
    scaled = make_train_step(small, {"policy": tx}, loss_scaling=True)(state, {}, np.ones(1))[1]
    np.testing.assert_allclose(scaled["grad_norm"], 0.25 * np.float32(np.float16(6e-8)), rtol=1e-6)


def test_loss_scale_halves_on_overflow_and_grows_after_good_steps(monkeypatch):
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 3)
    tx = optax.adam(0.1)
    step = jax.jit(make_train_step(half, {"policy": tx}, loss_scaling=True))
    state, seen = scaled_state(tx), []
    for data in (1, 1, 1, 1, 1):  # float16 ends at 65504: the scale of 65536 overflows at once
        before = state
        state, metrics = step(state, {}, np.full(1, data, np.float32))
        seen.append((float(metrics["loss_scale"]), float(metrics["overflow"]), float(metrics["skipped"])))
        if metrics["overflow"]:
            chex.assert_trees_all_equal((before.params, before.opt), (state.params, state.opt))
        else:
            np.testing.assert_allclose(metrics["grad_norm"], 1.0)
            assert metrics["update_norm"] > 0
    assert seen == [(65536, 1, 0), (32768, 0, 0), (32768, 0, 0), (32768, 0, 0), (65536, 1, 0)]
    assert state.step == 5


def test_overflow_that_no_scale_cures_is_a_failure():
    tx = optax.sgd(1.0)
    step = jax.jit(make_train_step(half, {"policy": tx}, loss_scaling=True))
    state, metrics = step(scaled_state(tx, LossScale.SMALLEST), {}, np.full(1, np.inf, np.float32))
    assert (metrics["overflow"], metrics["skipped"]) == (0, 1)
    assert state.extra["loss_scale"] == LossScale.SMALLEST
    _, metrics = step(scaled_state(tx, 4.0), {}, np.full(1, np.nan, np.float32))  # the loss itself is not finite
    assert (metrics["overflow"], metrics["skipped"]) == (0, 1)


def test_early_stop_masks_this_update_and_the_following_ones():
    tx = optax.sgd(0.1)
    step = jax.jit(make_train_step(objective, {"policy": tx}, early_stop=lambda m: m["loss"] < m["weight"] * 0 + 5))
    state = start(tx, "float32", {"skip": jnp.array(False)})
    stopped = []
    for _ in range(12):
        before = state
        state, metrics = step(state, {}, batch(dtype=np.float32))
        stopped.append(int(metrics["stopped"]))
        assert (metrics["loss"] < 5) == bool(stopped[-1])
        assert (metrics["update_norm"] == 0) == bool(stopped[-1])
        assert bool(state.extra["skip"]) == bool(stopped[-1])
        if stopped[-1]:
            chex.assert_trees_all_equal(before.params, state.params)
    assert stopped == sorted(stopped) and 0 in stopped and 1 in stopped


def test_eval_sums_add_up_to_the_whole(x64):
    step = jax.jit(make_eval_step(objective))
    params, data = start(optax.sgd(0.1)).params, batch()
    parts = [step(params, {}, {}, jax.tree.map(lambda x, i=i: x[i : i + 2], data)) for i in range(0, 8, 2)]
    whole = step(params, {}, {}, data)
    assert set(whole) == {"loss", "error"}
    for name, (total, weight) in whole.items():
        np.testing.assert_allclose(sum(p[name][0] for p in parts), total, rtol=1e-12)
        np.testing.assert_allclose(sum(p[name][1] for p in parts), weight, rtol=1e-12)
    np.testing.assert_allclose(whole["loss"][0] / whole["loss"][1], by_hand(params["policy"], data)[0], rtol=1e-12)


def test_mistakes_are_named():
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="3 equal micro-batches"):
        make_train_step(objective, {"policy": tx}, grad_accum_steps=3)(
            start(tx, "float32"), {}, batch(dtype=np.float32)
        )
    with pytest.raises(ValueError, match=r"losses for \['policy'\], the optimizer is for 'reward'"):
        state = start(tx, "float32")
        state = state._replace(params={"reward": state.params["policy"]}, opt={"reward": state.opt["policy"]})
        wrong = objective._replace(terms=lambda p, *rest: squared({"policy": p["reward"]}, *rest))
        make_train_step(wrong, {"reward": tx})(state, {}, batch(dtype=np.float32))
    with pytest.raises(ValueError, match=r"terms \['policy'\] have no divisor: its weights are of \['value'\]"):
        nameless = objective._replace(weights=lambda b: {"value": jnp.sum(b["w"])})
        make_train_step(nameless, {"policy": tx})(start(tx, "float32"), {}, batch(dtype=np.float32))

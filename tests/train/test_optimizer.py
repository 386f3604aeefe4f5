"""Optimizers and schedules against steps by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file

from jaxalign import config as configuration
from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.models import adapter as adapters
from jaxalign.models.transformer import Model
from jaxalign.ops.trees import split
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.train import trainer
from jaxalign.train.optimizer import kept_in, make_optimizer, make_schedule, updates_made
from tests.models import tiny_models as tiny


def section(**fields):
    cfg = defaults("sft").unlock().optimizer
    for name, value in fields.items():
        cfg[name] = value
    return cfg


def params():
    return {
        "layers": {
            "mlp": {"up": {"kernel": jnp.full((2, 3, 4), 2.0), "bias": jnp.full((2, 4), 2.0)}},
            "norm": {"scale": jnp.full((2, 3), 2.0)},  # stacked: two dims, and still no matrix
        }
    }


def test_schedules():
    cosine = make_schedule(section(schedule="cosine", warmup_steps=10, final_fraction=0.2), 2.0, 110)
    assert float(cosine(0)) == pytest.approx(0.2)
    assert float(cosine(9)) == pytest.approx(2.0)
    assert float(cosine(60)) == pytest.approx(2.0 * (0.2 + 0.8 * 0.5))
    assert float(cosine(110)) == pytest.approx(0.4) and float(cosine(500)) == pytest.approx(0.4)
    constant = make_schedule(section(schedule="constant"), 2.0, 5)
    assert [float(constant(i)) for i in (0, 4, 9)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("warmup, steps", [(0, 1), (5, 5), (7, 3)])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_short_runs_have_a_positive_finite_rate(schedule, warmup, steps):
    rate = make_schedule(section(schedule=schedule, warmup_steps=warmup), 1.0, steps)
    values = [float(rate(i)) for i in range(steps)]
    assert np.all(np.isfinite(values)) and min(values) > 0 and max(values) <= 1.0


def test_adamw_step_by_hand_with_decay_on_matrices_alone():
    cfg = section(schedule="constant", weight_decay=0.1, max_grad_norm=0.0, b1=0.9, b2=0.99, eps=1e-8)
    tx, p = make_optimizer(cfg, 0.01, 10), params()
    g = jax.tree.map(lambda x: jnp.full_like(x, 0.5), p)
    updates, _ = tx.update(g, tx.init(p), p)
    # first Adam step: m / (sqrt(v) + eps) = g / |g| = 1
    np.testing.assert_allclose(updates["layers"]["mlp"]["up"]["kernel"], -0.01 * (1 + 0.1 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["layers"]["mlp"]["up"]["bias"], -0.01, rtol=1e-5)
    np.testing.assert_allclose(updates["layers"]["norm"]["scale"], -0.01, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd", "schedule_free"])
def test_magnitudes_of_layers_without_an_update_do_not_decay(name):
    rules = adapters.Rules(2, 4.0, (r"layers\.[02].*q_proj", "down_proj"), dora=True)
    config = tiny.model().config
    model = Model(dataclasses.replace(config, adapter=adapters.make(config, rules)))
    start = split(model.init(jax.random.key(0)), adapters.is_adapter)[0]
    tx = make_optimizer(
        section(name=name, weight_decay=0.5, decay_mask="all", schedule="constant"), 0.1, 10, model.config.adapter
    )
    params, state = start, tx.init(start)
    for _ in range(3):
        grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
        query = grads["layers"]["attention"]["query"]
        query["magnitude"] = query["magnitude"].at[1].set(0)  # as the model has it
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    before, after = (tree["layers"]["attention"]["query"]["magnitude"] for tree in (start, params))
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after[0] - before[0]).min() > 0.01 and np.abs(after[2] - before[2]).min() > 0.01
    before, after = (tree["layers"]["mlp"]["down"]["magnitude"] for tree in (start, params))
    assert np.abs(after - before).min() > 0.01


def test_clip_is_by_the_norm_of_all_leaves():
    cfg = section(name="sgd", b1=0.0, schedule="constant", max_grad_norm=1.0)
    tx, p = make_optimizer(cfg, 1.0, 10), params()
    g = jax.tree.map(lambda x: jnp.full_like(x, 3.0), p)
    updates, _ = tx.update(g, tx.init(p), p)
    assert float(optax.global_norm(updates)) == pytest.approx(1.0, rel=1e-5)
    small = jax.tree.map(lambda x: 1e-3 * jnp.ones_like(x), p)
    updates, _ = tx.update(small, tx.init(p), p)
    np.testing.assert_allclose(updates["layers"]["norm"]["scale"], -1e-3, rtol=1e-5)


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_every_optimizer_goes_downhill(name, state_dtype):
    cfg = section(name=name, schedule="constant", b1=0.5, max_grad_norm=0.0, state_dtype=state_dtype)
    tx, p = make_optimizer(cfg, 0.05, 40), params()
    height = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))  # noqa: E731
    state, start = tx.init(p), float(height(p))

    @jax.jit
    def step(p, state):
        updates, state = tx.update(jax.grad(height)(p), state, p)
        return optax.apply_updates(p, updates), state

    for _ in range(20):
        p, state = step(p, state)
    assert float(height(p)) < 0.7 * start
    assert int(updates_made(state)) == 20


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_moments_in_bfloat16_take_half_the_bytes_and_stay_there(name):
    p = params()
    whole, half = (make_optimizer(section(name=name, state_dtype=d), 0.05, 40) for d in (None, "bfloat16"))
    state = half.init(p)
    after = half.update(p, state, p)[1]
    assert jax.tree.structure(state) == jax.tree.structure(whole.init(p))
    for a, b, full in zip(*map(jax.tree.leaves, (state, after, whole.init(p))), strict=True):
        assert a.dtype == b.dtype == (full.dtype if full.dtype == jnp.int32 else jnp.bfloat16)
    counts = sum(x.nbytes for x in jax.tree.leaves(state) if x.dtype == jnp.int32)
    assert num_bytes(whole.init(p)) - counts == 2 * (num_bytes(state) - counts) > 0


def test_float32_moments_of_bfloat16_weights():
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    tx = make_optimizer(section(state_dtype="float32"), 0.05, 40)
    state = tx.update(jax.tree.map(lambda x: x.astype(jnp.float32), p), tx.init(p), p)[1]
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_steps_with_bfloat16_moments_are_those_of_float32_but_for_the_rounding():
    p = {"kernel": jnp.linspace(0.5, 3.0, 1000)}
    whole, half = (
        make_optimizer(section(schedule="constant", state_dtype=d, max_grad_norm=0.0), 0.01, 40)
        for d in (None, "bfloat16")
    )
    a, b = whole.init(p), half.init(p)
    for step in range(3):
        grads = {"kernel": jnp.sin(p["kernel"] + step) + 1.5}
        x, a = whole.update(grads, a, p)
        y, b = half.update(grads, b, p)
        if step == 0:  # nothing was stored before it
            np.testing.assert_array_equal(x["kernel"], y["kernel"])
        # bfloat16 has neighbours up to 2^-7 apart, and two steps were rounded
        np.testing.assert_allclose(x["kernel"], y["kernel"], rtol=2 * 2**-7)
    assert not np.array_equal(x["kernel"], y["kernel"])


def test_trap_a_second_moment_in_bfloat16_rises_and_falls_as_it_should():
    """Rounded to the nearest it would stop at a third of where it belongs, and never fall."""
    n, b2 = 4000, 0.999
    tx = kept_in(optax.chain(optax.scale_by_adam(b2=b2), optax.scale_by_schedule(lambda _: 1.0)), "bfloat16")
    p = {"kernel": jnp.linspace(1.0, 2.0, n)}  # so many mantissas

    def run(state, size):
        body = lambda _, s: tx.update({"kernel": size * p["kernel"]}, s)[1]  # noqa: E731
        return jax.lax.fori_loop(0, 3000, body, state)

    run = jax.jit(run)
    state, level = tx.init(p), 0.0
    for size in (3.0, 1.0):
        state = run(state, size)
        level = size**2 + (level - size**2) * b2**3000
        found = np.asarray(state[0].nu["kernel"], np.float64) / np.asarray(p["kernel"], np.float64) ** 2
        np.testing.assert_allclose(found.mean(), level, rtol=0.01)  # right on average
        assert found.std() < 0.1 * level


def test_a_store_by_chance_is_the_same_each_time_and_another_each_step():
    tx = make_optimizer(section(state_dtype="bfloat16", max_grad_norm=0.0), 0.01, 40)
    p = {"kernel": jnp.linspace(0.5, 3.0, 1000)}
    state = tx.init(p)
    one, same = (jax.jit(tx.update)(p, state, p)[1] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    later = tx.update(p, (state[0]._replace(count=jnp.int32(0)), state[1]._replace(count=jnp.int32(7))), p)[1]
    assert not np.array_equal(one[0].nu["kernel"], later[0].nu["kernel"])
    odd = np.array([0x7F800000, 0xFF800000, 0x7FFFFFFF], np.uint32).view(np.float32)  # a GPU's NaN is all ones
    infinite = tx.update({"kernel": odd}, tx.init({"kernel": jnp.ones(3)}))[1]
    np.testing.assert_array_equal(infinite[0].mu["kernel"].astype(jnp.float32), [jnp.inf, -jnp.inf, jnp.nan])


def test_sgd_without_momentum_keeps_nothing_to_store():
    tx = make_optimizer(section(name="sgd", b1=0.0), 0.1, 10)
    assert [x.dtype for x in jax.tree.leaves(tx.init(params()))] == [jnp.int32]
    c = defaults("sft")
    c.workdir, c.model.path, c.data.sources = "runs/x", "model", ("data.jsonl",)
    c.optimizer.name, c.optimizer.state_dtype = "sgd", "bfloat16"
    configuration.validate(c)
    c.optimizer.b1 = 0.0
    with pytest.raises(InputError, match="sgd without momentum"):
        configuration.validate(c)
    c.optimizer.state_dtype = "float16"
    with pytest.raises(InputError, match=r"optimizer\.state_dtype is 'float16'"):
        configuration.validate(c)


def test_a_run_with_bfloat16_moments_goes_on_bit_by_bit(shared, tmp_path):
    def train(name, steps):
        fields = {"optimizer.state_dtype": "bfloat16", "optimizer.schedule": "constant", "num_train_steps": steps}
        config = make_config(stories(shared, tmp_path / name, "sft", **fields))
        return trainer.run(config, devices=jax.devices()[:1])

    straight = train("straight", 4)
    train("stopped", 2)
    resumed = train("stopped", 4)
    counts = 2 * 4  # Adam's and the schedule's
    for results in (straight, resumed):
        assert results["optimizer_bytes"] == results["model_bytes"]["policy"] + counts  # two bytes twice; four once
        assert results["num_compiles"] == 1
    a, b = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("straight", "stopped"))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("dtypes", [("bfloat16", None), ("float32", "bfloat16"), ("bfloat16", "bfloat16")], ids=str)
@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_trap_moments_in_bfloat16_settle_where_float32s_do(name, dtypes):
    """Rounded to the nearest, a second moment that began large stays at a multiple of its value."""
    fields = {"schedule": "constant", "max_grad_norm": 0.0, "b2": 0.999, "b1": 0.99 if name == "sgd" else 0.9}
    shapes = {"bias": (256,)} | ({"kernel": (128, 128)} if name == "adafactor" else {})  # so large it is factored
    rng = np.random.default_rng(0)
    noise = {leaf: 1 + rng.standard_normal((7, *shape), np.float32) for leaf, shape in shapes.items()}

    def settled(param_dtype, state_dtype):
        p = {leaf: jnp.ones(shape, param_dtype) for leaf, shape in shapes.items()}
        tx = make_optimizer(section(name=name, state_dtype=state_dtype, **fields), 1e-9, 10)
        table = jax.tree.map(jnp.asarray, noise)

        def body(i, state):
            size = jnp.where(i < 500, 3.0, 1.0)  # of gradients: what was large must come down
            grads = jax.tree.map(lambda x: (size * x[i % 7]).astype(param_dtype), table)
            return tx.update(grads, state, p)[1]

        state = jax.jit(lambda state: jax.lax.fori_loop(0, 3000, body, state))(tx.init(p))
        return [x.astype(jnp.float32) for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]

    for exact, found in zip(settled("float32", None), settled(*dtypes), strict=True):
        if exact.size > 1:
            np.testing.assert_allclose(float(found.mean()), float(exact.mean()), rtol=0.03)

"""Optimizers and schedules against steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.config import defaults
from jaxalign.train.optimizer import make_optimizer, make_schedule, updates_made


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


def test_clip_is_by_the_norm_of_all_leaves():
    cfg = section(name="sgd", b1=0.0, schedule="constant", max_grad_norm=1.0)
    tx, p = make_optimizer(cfg, 1.0, 10), params()
    g = jax.tree.map(lambda x: jnp.full_like(x, 3.0), p)
    updates, _ = tx.update(g, tx.init(p), p)
    assert float(optax.global_norm(updates)) == pytest.approx(1.0, rel=1e-5)
    small = jax.tree.map(lambda x: 1e-3 * jnp.ones_like(x), p)
    updates, _ = tx.update(small, tx.init(p), p)
    np.testing.assert_allclose(updates["layers"]["norm"]["scale"], -1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_every_optimizer_goes_downhill(name):
    tx, p = make_optimizer(section(name=name, schedule="constant", b1=0.5, max_grad_norm=0.0), 0.05, 40), params()
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

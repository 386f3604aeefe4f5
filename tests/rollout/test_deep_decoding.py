"""Decoding of deep models in a loop over groups of layers, with a cache of stacked arrays: the tokens of one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import schedule
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.rollout import continuous, driver, layout
from tests.rollout.test_continuous import PROMPTS, SAMPLING
from tests.train.ppo_world import STOP, drawn, prompt_batch, tiny_model


@pytest.fixture(scope="module")
def policy():
    """Four layers; the cache has two arrays of two each."""
    model = tiny_model(num_hidden_layers=4)
    return model, jax.tree.map(jnp.asarray, drawn(model))


def batched(policy, temperature=0.8, **options):
    """All completions of a batch, and their log-probs."""
    options = {"sampling": SAMPLING._replace(temperature=temperature), "stop_ids": STOP} | options
    batch, ids = prompt_batch(PROMPTS, 32), np.arange(len(PROMPTS), dtype=np.int32)
    out, _ = continuous.roll_out(*policy, batch.rows, jax.random.key(3), ids, **options)
    tokens, mask, _, logprobs, _ = (np.asarray(x) for x in out)
    return [t[m].tolist() for t, m in zip(tokens, mask, strict=True)], logprobs.sum(axis=1)


@pytest.fixture(scope="module")
def one_by_one(policy):
    return {t: batched(policy, temperature=t) for t in (0.0, 0.8)}


@pytest.fixture
def looped(monkeypatch):
    """Layers two at a time; tells how many dims the caches had, and who moved them."""
    monkeypatch.setattr(layout, "cache_arrays", lambda num_layers: num_layers // 2)
    monkeypatch.setattr(driver, "GROWTH", 4)
    monkeypatch.setattr(driver, "_WORTH", 2)
    monkeypatch.setattr(driver, "_FEWEST", 1)
    seen = {}
    for name in ("move", "gather", "seat", "refill", "advance"):
        call = getattr(driver, name)

        def spy(*args, name=name, call=call, **kwargs):
            out = call(*args, **kwargs)
            cache = (out[0] if name == "advance" else out).cache
            seen.setdefault(name, set()).add((len(cache.keys), cache.keys[0].ndim))
            return out

        monkeypatch.setattr(driver, name, spy)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("num_slots", [None, 3])
def test_a_loop_says_what_layers_one_by_one_say(policy, one_by_one, looped, temperature, num_slots):
    """Prompts seated together or in slots that are refilled; caches that grow, move and lose rows."""
    tokens, logprobs = batched(policy, temperature=temperature, num_slots=num_slots)
    assert tokens == one_by_one[temperature][0]
    np.testing.assert_allclose(logprobs, one_by_one[temperature][1], atol=2e-4)
    assert {"move", "gather", "advance", "refill" if num_slots else "seat"} <= set(looped)
    assert set.union(*looped.values()) == {(2, 5)}


def test_a_loop_on_eight_devices(policy, one_by_one, looped):
    model, params = policy
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    placed = model, jax.device_put(params, param_shardings(mesh, params))
    assert batched(placed, mesh=mesh)[0] == one_by_one[0.8][0]
    assert batched(placed, mesh=mesh, num_slots=4)[0] == one_by_one[0.8][0]
    assert set.union(*looped.values()) == {(2, 5)}


def test_on_a_tpu_the_program_does_not_grow_with_depth(monkeypatch):
    assert [schedule.cache_arrays(n) for n in (4, 80)] == [4, 80]  # a CPU would copy what is stacked
    monkeypatch.setattr(schedule, "platform", lambda: "tpu")
    assert [schedule.cache_arrays(n) for n in (32, 47, 61, 80, 126)] == [32, 47, 1, 4, 3]

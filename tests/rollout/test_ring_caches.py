"""Caches that keep the window's columns alone: completions are those of a forward pass over the whole sequence."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.cache import Cache, in_ring, ring_columns, rings, slot_counts
from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from jaxalign.ops.logits import logits
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.rollout import continuous, driver, layout, slots
from jaxalign.rollout.sampling import Sampling
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES
from tests.train.ppo_world import prompt_batch

# All layers with one window, of 1 or of another number than its multiples; some with one; of several lengths.
FAMILIES = ("mistral", "mistral_window_1", "ministral", "gemma2", "gemma3", "qwen3_windows", "phi3")
LIMIT = 40  # several times around each ring
LENGTHS = (3, 19, 1, 30, 9, 24, 5)
PROMPTS = [np.random.default_rng(n).integers(6, 64, n).astype(np.int32) for n in LENGTHS]


@functools.cache
def model_of(case):
    with jax.enable_x64(True):
        config = from_hf(CASES[case], **tiny.SETTINGS | {"dtype": "float64", "param_dtype": "float64"})
        model = Model(config)
        params = jax.jit(model.init)(jax.random.key(0))
        noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)  # noqa: E731
        return model, jax.tree.map(noise, params)


def check(model, params, found):
    """Each completion is the greedy one, and its log-prob that of a forward pass without a cache."""
    width = max(LENGTHS) + LIMIT
    forward = jax.jit(lambda rows: logits(model.apply(params, rows)[0], model.head(params)))
    for prompt, done in zip(PROMPTS, found, strict=True):
        whole = np.concatenate([prompt, np.asarray(done.ids, np.int32)])
        padded = np.pad(whole, (0, width - len(whole)))[None]
        each = jax.nn.log_softmax(forward(tiny.causal(padded)))[0, len(prompt) - 1 : len(whole) - 1]
        assert len(done.ids) == LIMIT and np.argmax(each, axis=-1).tolist() == done.ids
        total = each[np.arange(LIMIT), np.asarray(done.ids)].sum()
        np.testing.assert_allclose(done.logprob, total, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("case", "num_slots"), [*((case, 2) for case in FAMILIES), ("mistral", 7), ("gemma3", 7)])
def test_completions_are_those_of_the_whole_sequence(case, num_slots, monkeypatch, x64):
    """Prompts shorter and longer than the window, slots that are refilled, caches that grow and move; float64."""
    model, params = model_of(case)
    monkeypatch.setattr(driver, "GROWTH", 8)
    held, advance = [], driver.advance

    def seen(model, params, slots, *rest, **options):
        held.append({x.shape[2] for x in slots.cache.keys})
        return advance(model, params, slots, *rest, **options)

    monkeypatch.setattr(driver, "advance", seen)
    found, _ = continuous.continue_prompts(
        model, params, PROMPTS, jax.random.key(0), num_slots=num_slots, sampling=Sampling(0.0, LIMIT), stop_ids=()
    )
    check(model, params, found)
    assert all(min(each) == min(w for w in model.config.windows if w) for each in held)
    if None in model.config.windows:
        assert len({max(each) for each in held}) > 1  # the others have grown


@pytest.mark.parametrize("case", ["mistral", "gemma3"])
def test_samples_are_those_of_caches_of_all_columns(case, monkeypatch, x64):
    """At a temperature, with stops: rows end at other times, are compacted, and others take their places."""
    model, params = model_of(case)
    gathered, gather = [], driver.gather
    monkeypatch.setattr(driver, "gather", lambda *a, **o: gathered.append(1) or gather(*a, **o))
    monkeypatch.setattr(driver, "_FEWEST", 2)
    monkeypatch.setattr(driver, "_WORTH", 4)
    options = {"num_slots": 6, "sampling": Sampling(0.9, LIMIT), "stop_ids": (3, 17, 40), "num_samples": 2}

    def sampled():
        jax.clear_caches()
        return continuous.continue_prompts(model, params, PROMPTS, jax.random.key(1), **options)[0]

    found = sampled()
    assert gathered and len({len(done.ids) for done in found}) > 2
    monkeypatch.setattr(slots, "slot_counts", lambda windows, width, arrays: (width,) * arrays)
    for one, other in zip(found, sampled(), strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.logprob, other.logprob, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["mistral", "gemma3"])
def test_eight_devices(case, x64):
    model, params = model_of(case)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        split = jax.device_put(params, param_shardings(mesh, params))
        found, _ = continuous.continue_prompts(
            model, split, PROMPTS, jax.random.key(0), num_slots=4, mesh=mesh, sampling=Sampling(0.0, LIMIT), stop_ids=()
        )
    check(model, params, found)


@pytest.mark.parametrize("case", ["mistral", "gemma2"])
def test_prompts_that_are_seated_at_once(case, x64):
    """One batch, as PPO samples; two completions of each prompt are the same greedy one."""
    model, params = model_of(case)
    batch = prompt_batch(PROMPTS, 32)
    ids = np.repeat(np.arange(len(batch.rows.tokens), dtype=np.int32), 2)
    ids[2 * len(PROMPTS) :] = -1
    out, _ = continuous.roll_out(
        model, params, batch.rows, jax.random.key(0), ids, sampling=Sampling(0.0, LIMIT), stop_ids=()
    )
    tokens, mask, _, logprobs, _ = (np.asarray(x) for x in out)
    for copy in (0, 1):
        rows = range(copy, 2 * len(PROMPTS), 2)
        done = [continuous.Sampled(tokens[i][mask[i]].tolist(), float(logprobs[i].sum())) for i in rows]
        check(model, params, done)


@hypothesis.given(st.integers(1, 9), st.integers(1, 25), st.integers(0, 6), st.integers(1, 12))
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_ring_holds_the_last_columns_each_at_its_place(size, end, shift, had):
    """By lists: columns written one after the other, or all at once; then moved to the left."""
    wanted = [-1] * size
    for column in range(max(end - had, 0), end):
        wanted[column % size] = column
    columns = jnp.arange(max(end - had, 0), end)[:, None]
    ring = np.where(np.asarray(in_ring(columns + 1, end, size))[:, 0] == 0, -1, in_ring(columns, end, size)[:, 0])
    assert ring.tolist() == wanted
    held = np.asarray(ring_columns(jnp.array([[end]]), size))[0]
    assert all(column in (-1, held[slot]) for slot, column in enumerate(wanted))
    shift = min(shift, end - 1)
    kept = jnp.asarray(held, jnp.float32)[None, None, :, None]
    moved = np.asarray(slots._shift(kept, jnp.int32(shift)))[0, 0, :, 0] - shift
    assert moved.tolist() == np.asarray(ring_columns(jnp.array([[end - shift]]), size))[0].tolist()


def test_frequencies_that_nobody_stated_are_refused_where_all_layers_have_windows(x64):
    """The cache's columns count, not the fewer that its layers keep."""
    model, params = model_of("mistral")
    rope = dataclasses.replace(model.config.rope, kind="dynamic", factor=2.0, original_length=16, length=None)
    model = Model(dataclasses.replace(model.config, rope=rope))
    with pytest.raises(ValueError, match="not stated"):
        continuous.continue_prompts(
            model, params, PROMPTS[:1], jax.random.key(0), num_slots=1, sampling=Sampling(0.0, LIMIT), stop_ids=()
        )


def test_what_is_a_ring(x64):
    """An array for each layer, as wide as its window; of stacked arrays none; without windows nothing changes."""
    assert rings((4, None, 4), [4, 9, 3]) == (True, False, False)
    assert rings((4, None, 4, None), [4, 4]) == rings(None, [4, 4]) == (False, False)
    assert slot_counts(None, 9, 2) == (9, 9)
    model, _ = model_of("gemma3")
    c = model.config
    empty = slots.empty_slots(model, 0, batch=2, width=16, arrays=c.num_layers)
    assert [x.shape[2] for x in empty.cache.keys] == [w or 16 for w in c.windows]
    stacked = slots.empty_slots(model, 0, batch=2, width=16, arrays=1)
    assert [x.shape for x in stacked.cache.keys] == [(c.num_layers, 2, c.num_kv_heads, 16, c.head_dim)]


def test_the_count_of_memory_knows_rings(x64):
    """What decoding holds at most, with prompts that have been read beside the cache: they have all columns."""
    model, params = model_of("gemma3")
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    prompts = tiny.causal(np.zeros((4, 96), np.int32))
    read = jax.eval_shape(lambda p: slots.prefill(model, p, prompts), params)
    empty = jax.eval_shape(lambda: slots.empty_slots(model, 0, batch=4, width=96, arrays=model.config.num_layers))
    held = num_bytes((read.keys, read.values, empty.cache.keys, empty.cache.values))
    assert layout._needed(model, mesh, 4, 96)["cache"] == held
    full = 2 * num_bytes((read.keys, read.values))
    assert held < 0.75 * full


def test_several_tokens_at_once_take_a_cache_of_all_columns(x64):
    """As a caller of `apply` may give it, one as wide as the window among them."""
    model, params = model_of("mistral")
    window = model.config.windows[0]
    rows = tiny.causal(np.random.default_rng(0).integers(0, 64, (2, window)))
    cache, whole = tiny.empty_cache(model.config, 2, window), model.apply(params, rows)[0]
    for part in (slice(0, 4), slice(4, 5), slice(5, window)):
        found, cache, _ = model.apply(params, jax.tree.map(lambda x, part=part: x[:, part], rows), cache)
        np.testing.assert_allclose(found, whole[:, part], rtol=0, atol=1e-9)
    assert isinstance(cache, Cache)

"""Slots that are refilled: the same samples as of one batch, in fewer steps, each prompt read once."""

import threading

import jax
import numpy as np
import pytest

from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.rollout import continuous, driver, layout
from jaxalign.rollout.sampling import Sampling
from tests.train.ppo_world import STOP, prompt_batch

LIMIT = 24
SAMPLING = Sampling(0.8, LIMIT)
OPTIONS = {"sampling": SAMPLING, "stop_ids": STOP}
_RNG = np.random.default_rng(0)
# Lengths on both sides of a power of two, so that later prompts are wider than the column that slots stand at.
PROMPTS = [np.r_[1, _RNG.integers(6, 32, n)].astype(np.int32) for n in (2, 19, 4, 7, 1, 22, 30, 3, 12, 5, 26, 9)]


@pytest.fixture(scope="module")
def whole(policy):
    """All in one batch, a slot for each: ids and summed log-probs."""
    batch = prompt_batch(PROMPTS, 32)
    ids = np.arange(len(PROMPTS), dtype=np.int32)
    out, _ = continuous.roll_out(*policy, batch.rows, jax.random.key(3), ids, **OPTIONS)
    tokens, mask, _, logprobs, _ = (np.asarray(x) for x in out)
    assert {int(m.sum()) for m in mask} >= {LIMIT}  # some end at the limit, others long before
    assert min(m.sum() for m in mask) < LIMIT // 2
    return [t[m].tolist() for t, m in zip(tokens, mask, strict=True)], logprobs.sum(axis=1)


def run(policy, prompts=PROMPTS, mesh=None, **options):
    options = OPTIONS | {"num_slots": 3} | options
    return continuous.continue_prompts(*policy, prompts, jax.random.key(3), mesh=mesh, **options)


@pytest.mark.parametrize("num_slots,growth,row", [(3, 4, 256), (3, 4, 32), (4, 64, 32), (1, 16, 48)])
def test_refilled_slots_say_what_one_batch_says(policy, whole, monkeypatch, num_slots, growth, row):
    """Whatever the number of slots, the rows that prompts are read in, and however often the cache is moved."""
    monkeypatch.setattr(driver, "GROWTH", growth)
    monkeypatch.setattr(continuous, "_ROW", row)
    moves = []
    move = driver.move
    monkeypatch.setattr(driver, "move", lambda slots, shift, **o: moves.append(shift) or move(slots, shift, **o))
    found, _ = run(policy, num_slots=num_slots)
    assert [s.ids for s in found] == whole[0]
    np.testing.assert_allclose([s.logprob for s in found], whole[1], atol=2e-4)
    assert moves if growth == 64 else max(moves) > 0  # to the left where columns ran out, else only to the right


def test_slots_do_not_wait_for_their_neighbours(policy, whole):
    """A row that ends makes room at once: fewer steps than batches in turn, each as long as its longest."""
    _, stats = run(policy)
    lengths = [len(whole[0][i]) for i in sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))]
    in_turn = sum(max(lengths[i : i + 3]) for i in range(0, len(lengths), 3))
    steps = round(sum(lengths) / stats["slot_occupancy"] / 3)
    assert sum(lengths) / 3 <= steps < 0.9 * in_turn
    assert set(stats) == {"tokens_per_second", "slot_occupancy", "time/prefill", "time/decode"}
    assert min(stats.values()) > 0


def test_samples_of_a_prompt_share_its_reading(policy, monkeypatch):
    """Three of each prompt, numbered on, as if each prompt had been given three times; read once either way."""
    read = []
    prefill = layout.prefill

    def counted(model, params, rows):
        for tokens, first in zip(rows.tokens, rows.attend_start, strict=True):
            read.extend(tuple(tokens[first == start].tolist()) for start in np.unique(first[tokens > 0]))
        return prefill(model, params, rows)

    monkeypatch.setattr(layout, "prefill", counted)
    prompts = [p for p in PROMPTS if len(p) < 12]
    repeated, _ = run(policy, [p for p in prompts for _ in range(3)])
    assert sorted(read) == sorted(tuple(p.tolist()) for p in prompts)
    found, _ = run(policy, prompts, num_samples=3)
    assert [s.ids for s in found] == [s.ids for s in repeated]
    assert len({tuple(s.ids) for s in found}) > len(prompts)
    assert len(read) == 2 * len(prompts)


@pytest.mark.parametrize("meshed", [False, True])
def test_prompts_are_read_in_full_rows_of_one_shape(policy, monkeypatch, meshed):
    """Lengths of any kind: one program reads them all, and little of what it reads is padding."""
    shapes, prefill = [], layout.prefill
    monkeypatch.setattr(layout, "prefill", lambda *a: shapes.append(a[2].tokens.shape) or prefill(*a))
    lengths = np.minimum(np.random.default_rng(5).geometric(1 / 20, 400), 90)
    prompts = [
        np.r_[1, np.random.default_rng(i).integers(6, 32, n - 1)].astype(np.int32) for i, n in enumerate(lengths)
    ]
    mesh = make_mesh({"data": 2}, jax.devices()[:2]) if meshed else None
    if mesh is not None:
        model, params = policy
        policy = model, jax.device_put(params, param_shardings(mesh, params))
    found, _ = run(policy, prompts, mesh=mesh, num_slots=16, sampling=SAMPLING._replace(max_new_tokens=1))
    assert len(found) == len(prompts) and len(set(shapes)) == 1 and len(shapes) > 3
    assert sum(lengths) / sum(rows * columns for rows, columns in shapes) > 0.85


@pytest.mark.parametrize("groups,meshed", [(2, False), (3, False), (2, True)])
def test_groups_of_slots_say_what_one_batch_says(policy, whole, monkeypatch, groups, meshed):
    """Each in a thread of its own, on prompts of its own; with a mesh of one device as without."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1]) if meshed else None
    monkeypatch.setattr(continuous, "groups_of", lambda *_: groups)
    busy, prefill = set(), layout.prefill
    monkeypatch.setattr(layout, "prefill", lambda *a: busy.add(threading.get_ident()) or prefill(*a))
    found, stats = run(policy, num_slots=6, mesh=mesh)
    assert [s.ids for s in found] == whole[0]
    np.testing.assert_allclose([s.logprob for s in found], whole[1], atol=2e-4)
    assert len(busy) == groups
    assert 0 < stats["slot_occupancy"] <= 1


def test_a_group_that_fails_ends_the_others(policy, monkeypatch):
    """The second fails; the first, which would go on for long, ends before all its prompts have been read."""
    monkeypatch.setattr(continuous, "groups_of", lambda *_: 2)
    failed, refill, filled = threading.Event(), driver.refill, []

    def failing(slots, prefilled, rows, sources, ends, samples, count, **window):
        if 1 in samples[:count] or failed.is_set():
            filled.append(samples[:count])
        if 1 in samples[:count]:
            failed.set()
            raise RuntimeError("no room")
        assert failed.wait(60)
        return refill(slots, prefilled, rows, sources, ends, samples, count, **window)

    monkeypatch.setattr(driver, "refill", failing)
    with pytest.raises(RuntimeError, match="no room"):
        run(policy, sorted(PROMPTS, key=len), num_slots=2)
    assert len(filled) <= 2


@pytest.mark.parametrize("slots,cores,groups", [(16, 2, 2), (16, 64, 2), (15, 2, 1), (64, 4, 4), (4, 1, 1)])
def test_groups_are_no_smaller_than_pays(monkeypatch, slots, cores, groups):
    monkeypatch.setattr(driver.os, "cpu_count", lambda: cores)
    assert driver.groups_of(slots, None) == groups
    assert driver.groups_of(slots, make_mesh({"data": 2}, jax.devices()[:2])) == 1


def test_refilled_slots_on_eight_devices(policy, whole):
    model, params = policy
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    placed = jax.device_put(params, param_shardings(mesh, params))
    found, _ = run((model, placed), mesh=mesh, num_slots=4)
    assert [s.ids for s in found] == whole[0]


def batched(policy, mesh=None, **options):
    """All completions of a batch of rows."""
    batch, ids = prompt_batch(PROMPTS, 32), np.arange(len(PROMPTS), dtype=np.int32)
    out, figures = continuous.roll_out(*policy, batch.rows, jax.random.key(3), ids, mesh=mesh, **OPTIONS | options)
    tokens, mask, _, logprobs, _ = (np.asarray(x) for x in out)
    return [t[m].tolist() for t, m in zip(tokens, mask, strict=True)], logprobs.sum(axis=1), figures


@pytest.mark.parametrize("num_slots,groups,temperature", [(3, 1, 0.8), (5, 1, 0.0), (12, 2, 0.8), (6, 3, 0.8)])
def test_a_batch_in_fewer_slots_or_in_groups_is_the_same(policy, monkeypatch, num_slots, groups, temperature):
    """Tokens bitwise, greedy and sampled, whatever the number of slots and of threads."""
    sampling = SAMPLING._replace(temperature=temperature)
    whole = batched(policy, sampling=sampling)
    monkeypatch.setattr(continuous, "groups_of", lambda *_: groups)
    found = batched(policy, num_slots=num_slots, sampling=sampling)
    assert found[0] == whole[0]
    np.testing.assert_allclose(found[1], whole[1], atol=2e-4)
    if num_slots < 12:
        assert found[2]["slot_occupancy"] > whole[2]["slot_occupancy"]


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_rows_that_are_left_move_together(policy, whole, monkeypatch, sizes):
    """The same tokens in fewer slots' steps, on any mesh: on one device as few as the live rows allow."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    model, params = policy
    placed = model, jax.device_put(params, param_shardings(mesh, params))
    monkeypatch.setattr(driver, "_WORTH", 2)
    _, _, apart = batched(placed, mesh=mesh)
    monkeypatch.setattr(driver, "_FEWEST", 1)
    shapes, gather = [], driver.gather
    monkeypatch.setattr(driver, "gather", lambda *a, **o: shapes.append(len(a[1])) or gather(*a, **o))
    ids, logprobs, figures = batched(placed, mesh=mesh)
    assert ids == whole[0]
    np.testing.assert_allclose(logprobs, whole[1], atol=2e-4)
    assert shapes == sorted(shapes, reverse=True) and shapes
    assert figures["slot_occupancy"] > apart["slot_occupancy"]


def test_a_growing_cache_changes_nothing(policy, whole, monkeypatch):
    widths = []
    move = driver.move
    monkeypatch.setattr(driver, "GROWTH", 4)
    monkeypatch.setattr(driver, "move", lambda *a, width, **o: widths.append(width) or move(*a, width=width, **o))
    monkeypatch.setattr(driver, "cache_width", lambda columns: columns)
    ids, logprobs, _ = batched(policy)
    assert len(widths) > 3 and widths == sorted(widths)
    assert ids == whole[0]
    np.testing.assert_allclose(logprobs, whole[1], atol=2e-4)


def test_widths_are_those_that_a_plan_counts(policy, monkeypatch):
    """Prompts that fill their columns and completions of the full length."""
    monkeypatch.setattr(driver, "GROWTH", 4)
    seen, advance = [], driver.advance
    width = lambda slots: slots.cache.keys[0].shape[-2]  # noqa: E731

    def noted(*args, **options):
        before = width(args[2])
        slots, draws, steps = advance(*args, **options)
        seen.append((before, int(steps)))
        return slots, draws, steps

    monkeypatch.setattr(driver, "advance", noted)
    rows, ids = prompt_batch([list(range(1, 15))] * 2, 14).rows, np.arange(2, dtype=np.int32)
    options = {"sampling": Sampling(1.0, 40), "stop_ids": (-1,)}
    continuous.roll_out(*policy, rows, jax.random.key(0), ids, **options)
    assert seen == driver.cache_widths(14, 40)
    assert len(seen) > 3


def test_nothing_to_say(policy):
    assert run(policy, []) == ([], {})

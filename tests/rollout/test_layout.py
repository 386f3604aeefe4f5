"""Where decoding runs: meshes of the same devices, parameters that are seen on them, and what fits."""

import jax
import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.models.config import from_hf
from jaxalign.models.schedule import split_layers
from jaxalign.models.transformer import Model
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, put_batch
from jaxalign.rollout import driver, layout, sizes, slots
from jaxalign.rollout.continuous import continue_prompts, roll_out
from jaxalign.rollout.sampling import Sampling
from tests.train.ppo_world import STOP, prompt_batch

PROMPTS = [[1, 7, 9], [1, 8], [1, 9, 10, 11], [1, 12, 13, 4], [1, 14], [1, 15, 2], [1, 16, 17], [1, 18]]
IDS = np.arange(8, dtype=np.int32)
OPTIONS = {"sampling": Sampling(0.8, 9), "stop_ids": STOP}


@pytest.fixture(scope="module")
def alone(policy):
    """Completions on one device."""
    rollout, _ = roll_out(*policy, prompt_batch(PROMPTS, 5).rows, jax.random.key(3), IDS, **OPTIONS)
    return np.asarray(rollout.tokens)


def mesh_of(data, fsdp, tensor=1):
    return make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.mark.parametrize(
    "data, fsdp, tensor, num_slots", [(1, 8, 1, None), (1, 8, 2, None), (2, 4, 4, None), (1, 8, 2, 4)]
)
def test_completions_do_not_depend_on_the_split(policy, alone, data, fsdp, tensor, num_slots):
    """Training's rows and weights over `fsdp`, decoding's layers over some of the same devices."""
    model, params = policy
    mesh = mesh_of(data, fsdp)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(mesh, params))
        rows, ids = put_batch((prompt_batch(PROMPTS, 5).rows, IDS), mesh)
        key = jax.jit(lambda: jax.random.fold_in(jax.random.key(3), 0))()
        options = OPTIONS | {"mesh": mesh, "tensor": tensor, "num_slots": num_slots}
        rollout, figures = roll_out(model, params, rows, jax.random.key(3), ids, **options)
        assert figures["tensor"] == tensor
        assert rollout.tokens.sharding.mesh == mesh
        np.testing.assert_array_equal(np.asarray(rollout.tokens), alone)
        found, _ = continue_prompts(
            model, params, [np.array(p, np.int32) for p in PROMPTS], key, **options | {"num_slots": num_slots or 8}
        )
    one, _ = continue_prompts(*policy, [np.array(p, np.int32) for p in PROMPTS], key, num_slots=8, **OPTIONS)
    assert [s.ids for s in found] == [s.ids for s in one]


def test_nothing_moves_when_arrays_are_seen_on_another_mesh():
    mesh = mesh_of(2, 4)
    decoding = layout.decoding_mesh(mesh, 2)
    assert dict(decoding.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert list(decoding.devices.flat) == list(mesh.devices.flat)
    x = put_batch(np.arange(16.0, dtype=np.float32), mesh)
    seen = layout.seen_on({"x": x, "n": 3}, decoding)
    assert seen["n"] == 3 and seen["x"].sharding.mesh == decoding
    np.testing.assert_array_equal(seen["x"], x)
    pairs = zip(seen["x"].addressable_shards, x.addressable_shards, strict=True)
    assert all(a.data.unsafe_buffer_pointer() == b.data.unsafe_buffer_pointer() for a, b in pairs)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_parameters_are_laid_out_whole_but_for_tensor(policy, tensor):
    model, params = policy
    mesh = mesh_of(1, 8)
    placed = jax.device_put(params, param_shardings(mesh, params))
    place = layout.Place(mesh, layout.decoding_mesh(mesh, tensor))
    laid = place.lay_out(model, placed)
    expected = params | {"layers": split_layers(params["layers"], model.config.num_layers)}
    jax.tree.map(np.testing.assert_array_equal, laid, expected)
    gate = laid["layers"][0]["mlp"]["gate"]["kernel"]
    assert gate.sharding.shard_shape(gate.shape) == (gate.shape[0], gate.shape[1] // tensor)


def eight_billion():
    """Whole on a device 15 GiB."""
    shape = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    heads = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}
    return Model(from_hf(shape | heads, dtype="bfloat16", param_dtype="float32", remat="full"))


def test_weights_are_split_as_little_as_fits():
    model, mesh = eight_billion(), mesh_of(1, 8)

    def split(gib, mesh=mesh, held=25 << 30, asked=None):
        limit = gib if gib is None else gib << 30
        return layout.split_of(model, mesh, asked, slots=128, columns=768, held=held, limit=limit)

    assert [split(gib).tensor for gib in (None, 60, 45, 38, 35)] == [1, 1, 2, 4, 8]  # None: not known, as on a CPU
    assert split(38, held=0).tensor == 1
    assert split(10).tensor == 8  # nothing fits: what needs least
    assert split(10, mesh_of(1, 4, 2)).tensor == 2  # training's own
    assert split(60, asked=4).tensor == 4
    whole, halves = split(60), split(45)
    assert halves.needed["weights"] < whole.needed["weights"] < 16 << 30
    assert halves.needed["cache"] == whole.needed["cache"]  # of twice the rows, half the heads
    said = [split(None), split(60), split(10), split(10, asked=4), split(60, mesh_of(1, 4, 2))]
    assert len({one.why for one in said}) == len(said)


def test_rows_are_scored_in_as_few_parts_as_fit():
    model, mesh = eight_billion(), mesh_of(1, 8)

    def parts(limit, most=8):
        return layout.fewest_parts(model, mesh, (128, 768), most, 25 << 30, limit)

    assert parts(None) == 8  # not known: as in training
    assert [parts(gib << 30) for gib in (80, 30, 29, 20)] == [1, 2, 4, 8]
    assert parts(20 << 30, most=6) == 6


def test_a_split_that_fsdp_does_not_allow_is_refused():
    for mesh, tensor in ((mesh_of(2, 4), 8), (mesh_of(1, 8), 3), (mesh_of(1, 4, 2), 4)):
        with pytest.raises(InputError, match="tensor"):
            layout.decoding_mesh(mesh, tensor)


def test_rows_are_counted_every_few_steps_where_they_lie_on_several_devices(policy, monkeypatch):
    """Each count is a collective: rows that have ended wait a few steps more, and nothing else changes."""
    model, params = policy
    taken, advance = {1: [], 8: []}, driver.advance
    for devices, seen in taken.items():
        mesh = make_mesh({"data": 1, "fsdp": devices, "tensor": 1}, jax.devices()[:devices])
        monkeypatch.setattr(driver, "advance", lambda *a, seen=seen, **o: seen.append(advance(*a, **o)) or seen[-1])
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, param_shardings(mesh, params))
            rows, ids = put_batch((prompt_batch([[1, 8]] * 8, 5).rows, np.full(8, 1, np.int32)), mesh)
            roll_out(model, placed, rows, jax.random.key(3), ids, mesh=mesh, sampling=Sampling(0.8, 64), stop_ids=STOP)
    alone, together = (sum(int(steps) for *_, steps in seen) for seen in (taken[1], taken[8]))
    assert alone % slots._UNSEEN  # or this shows nothing
    assert together == -(-alone // slots._UNSEEN) * slots._UNSEEN


def test_caches_are_in_whole_tiles_on_accelerators(monkeypatch):
    monkeypatch.setattr(sizes, "platform", lambda: "gpu")
    assert [sizes.cache_width(n) for n in (1, 130, 300, 768, 800)] == [128, 256, 384, 768, 1024]

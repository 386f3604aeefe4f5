"""Digests of models: every number counts, nothing else does."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.models.identity import describe, fingerprint, identify
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from tests.models import tiny_models as tiny


def test_fingerprint_sees_every_number_and_no_mesh():
    params = {"layers": {"mlp": {"down": {"kernel": np.arange(2 * 8 * 4, dtype=np.float32).reshape(2, 8, 4)}}}}
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    one, many = jax.device_put(params), jax.device_put(params, param_shardings(mesh, params))
    assert fingerprint(one) == fingerprint(many)
    # On a CPU an array on the device may be the very memory that it was made from.
    params = jax.tree.map(np.copy, params)
    kernel = params["layers"]["mlp"]["down"]["kernel"]
    kernel[1, 3, 2] = np.nextafter(kernel[1, 3, 2], np.float32(np.inf))
    assert fingerprint(one) != fingerprint(jax.device_put(params))
    params = jax.tree.map(np.copy, params)
    kernel = params["layers"]["mlp"]["down"]["kernel"]
    kernel[1, 3, 2], kernel[1, 3, 1] = kernel[1, 3, 1], 62.0
    assert fingerprint(one) != fingerprint(jax.device_put(params))  # swapped numbers too


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"rms_norm_eps": 1e-6},
        {"dtype": "bfloat16"},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        {"tie_word_embeddings": False},
    ],
)
def test_a_description_is_all_that_is_computed(changes):
    assert describe(tiny.model(**changes).config) != describe(tiny.model().config)


def test_a_description_is_not_how_it_is_computed():
    config = tiny.model().config
    other = dataclasses.replace(config, remat="full", hf_config="{}")
    assert describe(config) == describe(other)
    assert describe(config) == describe(tiny.model(use_cache=False, bos_token_id=5).config)


def test_checkpoints_are_told_apart_by_their_weights(tmp_path):
    hf = tiny.hf_config()
    one = tiny.write(tmp_path / "one", hf, tiny.tensors(hf))
    shutil.copytree(one, tmp_path / "copy")
    shards = tiny.write(tmp_path / "shards", hf, tiny.tensors(hf), max_bytes=20_000)
    assert identify(one) == identify(tmp_path / "copy") == identify(shards)
    assert identify(one) != identify(tiny.write(tmp_path / "two", hf, tiny.tensors(hf, seed=1)))
    tree = load_file(one / "model.safetensors")
    tree["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    save_file(tree, one / "model.safetensors")
    assert identify(one) != identify(tmp_path / "copy")


@pytest.mark.parametrize(
    "place,seen", [(0, True), (1023, True), (1024, False), (5120, True), (10239, True), (9000, False)]
)
def test_of_a_long_tensor_three_places_are_seen(tmp_path, place, seen):
    """As the docstring says: who relies on more must read the whole."""
    numbers = {"w": np.zeros(10240, np.float32)}
    save_file(numbers, tmp_path / "model.safetensors")
    before = identify(tmp_path)
    numbers["w"][place] = 1
    save_file(numbers, tmp_path / "model.safetensors")
    assert (identify(tmp_path) != before) == seen

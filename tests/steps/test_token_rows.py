"""Vectors of some tokens trained: their gradients are the whole model's, and what is beside them keeps its bits."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.token_rows import EMBEDDING, HEAD, TokenRows, leaf_of, table_of
from jaxalign.models.transformer import Model
from jaxalign.ops.trees import by_path, from_paths, split
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, put_batch
from jaxalign.steps.preference import preference_objective
from jaxalign.steps.sft import sft_objective
from jaxalign.steps.step import make_train_step
from jaxalign.types import TrainState
from tests.steps import worlds
from tests.steps.layouts import perturbed, tiny_model

IDS = {EMBEDDING: [3, 4, 5, 9, 31], HEAD: [0, 3, 4, 17]}
CHANGES = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "gemma2": {"tie_word_embeddings": True, "model_type": "gemma2"},
}


@functools.cache
def models(tied):
    """The model as it is, and with vectors of its own."""
    fields = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4, "tie_word_embeddings": tied}
    model = tiny_model(**fields)
    ids = {table: own for table, own in IDS.items() if table == EMBEDDING or not tied}
    own = dataclasses.replace(model.config, token_rows=TokenRows.of(ids), embed_scale=None)
    return model, Model(own)


@functools.cache
def start(tied):
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)

        def draw(path, leaf):
            noise = rng.standard_normal(leaf.shape)
            return jnp.asarray(1 + 0.1 * noise if "scale" in str(path) else 0.3 * noise, leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, models(tied)[0].abstract())


def apart(model, params):
    """The parameters with some tokens' vectors beside their tables, which have others in their place."""
    leaves, found = by_path(params), {}
    for path in by_path(model.abstract()):
        if (table := table_of(path)) is None:
            found.setdefault(path, leaves[path])
        else:
            own = model.config.token_rows.ids(table)
            found[path] = leaves[table][own] if table == EMBEDDING else leaves[table].T[own]
            where = own if table == EMBEDDING else (slice(None), own)
            found[table] = leaves[table].at[where].set(7.0)  # what is there is not read
    return from_paths(found)


def objective(model, algorithm):
    if algorithm == "sft":
        return sft_objective(model.apply, model.head, entropy=True)
    return preference_objective(
        model.apply, model.head, loss="sigmoid", beta=0.3, label_smoothing=0.1, reference="live"
    )


def stepped(algorithm, tied, own, *, mesh=None, accum=1):
    """(metrics, gradients) of a step that trains some vectors and one norm, or all."""
    model, params, batch = models(tied)[own], start(tied), worlds.data(algorithm)
    frozen = {"ref": perturbed(params)} if algorithm == "dpo" else {}
    if own:
        params, rest = split(apart(model, params), lambda path: table_of(path) is not None or path == "norm/scale")
        frozen = {name: apart(model, tree) for name, tree in frozen.items()} | {"policy": rest}
    state = TrainState(jnp.int32(0), {"policy": params}, {"policy": worlds.SGD.init(params)}, {}, jnp.int32(0))
    if mesh is not None:
        state, batch = jax.device_put(state, worlds.shardings(mesh, state)), put_batch(batch, mesh)
        frozen = jax.device_put(frozen, param_shardings(mesh, frozen))
    step = make_train_step(objective(model, algorithm), {"policy": worlds.SGD}, grad_accum_steps=accum)
    before = jax.tree.map(np.asarray, frozen)
    new, metrics = jax.block_until_ready(jax.jit(step, compiler_options=worlds.COMPILER)(state, frozen, batch))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, frozen), before)
    return metrics, jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, new.params["policy"])


def check(found, algorithm, tied):
    metrics, gradients = stepped(algorithm, tied, False)
    whole, own = by_path(gradients), by_path(found[1])
    assert own.keys() == {"norm/scale", leaf_of(EMBEDDING)} | ({leaf_of(HEAD)} if not tied else set())
    for path, gradient in own.items():
        if table := table_of(path):
            every = whole[table] if table == EMBEDDING else whole[table].T
            expected = every[IDS[table]]
            assert np.abs(expected).max() > 1e-3
        else:
            expected = whole[path]
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9, err_msg=path)
    same = [name for name in metrics if "norm" not in name]
    chex.assert_trees_all_close({n: found[0][n] for n in same}, {n: metrics[n] for n in same}, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("algorithm, accum", [("sft", 1), ("sft", 4), ("dpo", 1)])
def test_gradients_are_those_of_the_whole_tables(algorithm, accum, tied, x64):
    check(stepped(algorithm, tied, True, accum=accum), algorithm, tied)


@pytest.mark.parametrize("tied", [True, False])
def test_on_eight_devices(tied, x64):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        found = stepped("dpo", tied, True, mesh=mesh, accum=2)
    check(found, "dpo", tied)

"""Some layers trained: their gradients are the whole model's, and below the first of them nothing goes backward."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import stacks
from jaxalign.models.schedule import split_layers
from jaxalign.ops.trees import by_path, join, split
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, put_batch
from jaxalign.steps.preference import preference_objective
from jaxalign.steps.sft import sft_objective
from jaxalign.steps.step import make_train_step
from jaxalign.types import Rows, TrainState
from tests.steps import worlds
from tests.steps.layouts import perturbed, tiny_model

LAYERS = 4
CUTS = (1, 2, 3)  # layers 1 and 3 are trained: each stack is alone between two of the other kind


@functools.cache
def model(remat="none"):
    # Every dim is a multiple of eight, so that eight devices split it.
    fields = {"num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4}
    return tiny_model(remat=remat, **fields)


def chosen(path):
    """Of layer 1 its mlp and norms, all of layer 3."""
    own, layer, stop = stacks.place(path)
    return stop is not None and (layer == 3 or (layer == 1 and not own.startswith("layers/attention/")))


@functools.cache
def start():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)

        def draw(path, leaf):
            noise = rng.standard_normal(leaf.shape)
            return jnp.asarray(1 + 0.1 * noise if "scale" in str(path) else 0.3 * noise, leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, model().abstract())


def cut(params, cuts=CUTS):
    return params | {"layers": stacks.cut(params["layers"], cuts)}


def objective(algorithm, remat="none"):
    own = model(remat)
    if algorithm == "sft":
        return sft_objective(own.apply, own.head, entropy=True)
    return preference_objective(own.apply, own.head, loss="sigmoid", beta=0.3, label_smoothing=0.1, reference="live")


def stepped(algorithm, trains=None, *, accum=1, remat="none", mesh=None, cuts=CUTS):
    """(metrics, gradients, frozen) of a step that trains what `trains` says, or all in one stack."""
    params, batch = start(), worlds.data(algorithm)
    frozen = {"ref": perturbed(params)} if algorithm == "dpo" else {}
    if trains is not None:
        params, rest = split(cut(params, cuts), trains)
        frozen = {name: cut(tree, cuts) for name, tree in frozen.items()} | {"policy": rest}
    state = TrainState(jnp.int32(0), {"policy": params}, {"policy": worlds.SGD.init(params)}, {}, jnp.int32(0))
    if mesh is not None:
        state, batch = jax.device_put(state, worlds.shardings(mesh, state)), put_batch(batch, mesh)
        frozen = jax.device_put(frozen, param_shardings(mesh, frozen))
    step = make_train_step(objective(algorithm, remat), {"policy": worlds.SGD}, grad_accum_steps=accum)
    before = jax.tree.map(np.asarray, frozen)
    new, metrics = jax.block_until_ready(jax.jit(step, compiler_options=worlds.COMPILER)(state, frozen, batch))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, frozen), before)
    return metrics, jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, new.params["policy"])


@functools.cache
def expected(algorithm):
    """Of the whole model, of which those of the chosen layers are taken."""
    with jax.enable_x64(True):
        metrics, gradients = stepped(algorithm)
        return metrics, split(cut(gradients), chosen)[0]


def assert_masked(found, algorithm):
    metrics, gradients = expected(algorithm)
    assert {path.split("/")[1] for path in by_path(gradients)} == {"1-1", "3-3"}
    chex.assert_trees_all_close(found[1], gradients, rtol=1e-9, atol=1e-9)
    same = [name for name in metrics if "norm" not in name]
    chex.assert_trees_all_close({n: found[0][n] for n in same}, {n: metrics[n] for n in same}, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_training_some_layers_is_training_the_whole_masked(algorithm, remat, x64):
    assert_masked(stepped(algorithm, chosen, remat=remat), algorithm)


def test_accumulated(x64):
    assert_masked(stepped("sft", chosen, accum=4, remat="full"), "sft")


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_on_eight_devices(remat, x64):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        found = stepped("dpo", chosen, mesh=mesh, remat=remat, accum=2)
    assert_masked(found, "dpo")


def products(jaxpr):
    """How many products a program has, those of a loop's turns counted."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [x for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))]
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for one in inner:
            own = getattr(one, "jaxpr", one)
            total += turns * products(own) if hasattr(own, "eqns") else 0
        total += eqn.primitive.name == "dot_general"
    return total


@pytest.mark.parametrize("remat", ["none", "full"])
def test_nothing_goes_backward_below_the_first_trained_layer(remat, x64):
    """The last of four layers trained: its backward pass and four forward ones, whichever way layers run."""
    own, shapes = model(remat), jax.eval_shape(start)
    tokens = jnp.zeros((2, 16), jnp.int32)
    places = jnp.arange(16)[None].repeat(2, 0)
    rows = Rows(tokens, places, 0 * places, places + 1)

    def count(cuts, trains):
        whole = shapes if cuts is None else shapes | {"layers": stacks.cut(shapes["layers"], cuts)}
        learned, frozen = split(whole, trains)
        loss = lambda learned, frozen: own.apply(join(learned, frozen), rows)[0].sum()  # noqa: E731
        return (
            products(jax.make_jaxpr(loss)(learned, frozen).jaxpr),
            products(jax.make_jaxpr(jax.grad(loss))(learned, frozen).jaxpr),
        )

    last = lambda path: path.startswith("layers/3-3/")  # noqa: E731
    forward, some = count((3,), last)
    same, first = count((1,), lambda path: path.startswith("layers/0-0/"))
    all_forward, everything = count(None, lambda path: path.startswith("layers/"))
    assert forward == same == all_forward and forward % LAYERS == 0
    # What a trained layer adds at the top is a quarter of what all four add, but for what goes on to the layer below.
    of_last, of_all = some - forward, everything - forward
    assert 0 < of_last <= of_all / LAYERS
    assert first - forward > 0.6 * of_all  # below the others: they all go backward


def test_decoding_and_reading_prompts(x64):
    """Stacks are read as one, by layers of their own and by every second one."""
    params, rows = start(), worlds.data("sft").rows
    for x, y in zip(model().prefill(cut(params), rows), model().prefill(params, rows), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)
    for arrays in (4, 2):
        laid = split_layers(params["layers"], arrays)
        for i in range(arrays):
            own = stacks.every(cut(params)["layers"], i, arrays)
            chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0] if len(x) == 1 else x, own), laid[i])


def test_a_cut_model_declares_makes_and_joins_its_stacks(x64):
    own = dataclasses.replace(model(), config=dataclasses.replace(model().config, cuts=(1, 3)))
    key = jax.random.key(0)
    made, whole = own.init(key), model().init(key)
    chex.assert_trees_all_equal(made, cut(whole, (1, 3)))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), made)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), own.abstract())
    assert by_path(stacks.uncut(own.abstract())) == by_path(model().abstract())
    assert [one[:2] for one in stacks.stacks(made["layers"])] == [(0, 1), (1, 3), (3, 4)]

"""An evaluation goes through its batch in the train step's micro-batches: the figures stay, the memory falls."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, put_batch
from jaxalign.steps.preference import sequence_logprobs
from jaxalign.steps.step import make_eval_step
from jaxalign.train.reference import reference_pass
from tests.steps import test_objectives, worlds
from tests.steps.test_objectives import CASES

MESHES = {"one device": None, "data": (8, 1, 1), "mixed": (2, 2, 2)}


def evaluated(objective, given, batch, parts, axes=None):
    """{name: (sum, weight)}"""
    step = jax.jit(make_eval_step(objective, grad_accum_steps=parts), compiler_options=worlds.COMPILER)
    if axes is None:
        return jax.device_get(step(*given, batch))
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), axes, strict=True)))
    with jax.set_mesh(mesh):
        given = *jax.device_put(given[:2], param_shardings(mesh, given[:2])), given[2]
        return jax.device_get(jax.block_until_ready(step(*given, put_batch(batch, mesh))))


@pytest.mark.parametrize("mesh, parts", [("one device", 8), ("mixed", 2)])
@pytest.mark.parametrize("algorithm", worlds.ALGORITHMS)
def test_figures_are_those_of_the_whole_batch(algorithm, mesh, parts, x64):
    """Loss, accuracies, margins; packed rows among them, of which half are empty: whole parts have no weight."""
    given, objective = (*worlds.start(algorithm), {}), worlds.objective(algorithm)
    data = worlds.data(algorithm, packed=algorithm != "ppo")
    whole, found = evaluated(objective, given, data, 1), evaluated(objective, given, data, parts, MESHES[mesh])
    assert whole.keys() == found.keys() and any(name.startswith("loss") for name in whole)
    chex.assert_trees_all_close(found, whole, rtol=1e-9, atol=1e-9)
    if algorithm in worlds.PAIRED:
        assert {"rewards/accuracies", "rewards/margins"} <= whole.keys()


@pytest.mark.parametrize("mesh, parts", [("one device", 4), ("one device", 64), ("data", 4), ("data", 8)])
@pytest.mark.parametrize("case", CASES)
def test_what_needs_the_whole_batch_has_it(case, mesh, parts, x64):
    """A mean of the batch in each item's loss, and a sort of it: equal to the loops over all rows."""
    objective, _, extra = CASES[case]
    state = test_objectives.start({name: jnp.float64(x) for name, x in extra.items()})
    batch, given = test_objectives.batch(), (state.params, {}, state.extra)
    step = jax.jit(make_eval_step(objective, grad_accum_steps=parts))
    if mesh == "one device":
        found = step(*given, batch)
    else:
        mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), MESHES[mesh], strict=True)))
        with jax.set_mesh(mesh):
            found = jax.block_until_ready(step(*given, put_batch(batch, mesh)))
    divided, whole = (
        {name: np.sum(total / weight) for name, (total, weight) in sums.items()}  # of several terms in any order
        for sums in (found, make_eval_step(objective)(*given, batch))
    )
    np.testing.assert_allclose(divided["loss"], test_objectives.by_loop(case)[0], rtol=1e-9)
    chex.assert_trees_all_close(divided, whole, rtol=1e-9, atol=1e-9)


def temporary(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo"])
def test_parts_take_less_memory_and_less_than_training(algorithm, x64):
    (params, frozen), data = worlds.start(algorithm), worlds.data(algorithm)
    objective, state = worlds.objective(algorithm), worlds.fresh(algorithm)
    whole, parts = (temporary(make_eval_step(objective, grad_accum_steps=n), params, frozen, {}, data) for n in (1, 4))
    assert parts < 0.5 * whole
    optimizers = dict.fromkeys(params, worlds.SGD)
    training = temporary(worlds.make_train_step(objective, optimizers, grad_accum_steps=4), state, frozen, data)
    assert parts < training


def test_a_reference_pass_in_parts(x64):
    model, (params, _), batch = worlds.model("lm"), worlds.start("dpo"), worlds.data("dpo", packed=True)
    expected = sequence_logprobs(model.apply, model.head, params["policy"], batch)
    found = {n: reference_pass(model, n) for n in (1, 4)}
    for one in found.values():
        chex.assert_trees_all_close(one(params["policy"], batch), expected, rtol=1e-9, atol=1e-9)
    assert found[4].memory["temporary"] < 0.5 * found[1].memory["temporary"]

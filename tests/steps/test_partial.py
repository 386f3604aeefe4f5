"""A part of a model trained, the rest frozen: the gradients are those of the whole model, masked."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.trees import join, joined, split
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, put_batch
from jaxalign.steps.objective import Objective, Sums
from jaxalign.steps.step import make_eval_step, make_train_step
from tests.steps import worlds


def attention(path):
    return path.startswith("layers/attention/")


def of_part(algorithm, *, accum=1, mesh=None, objective=None):
    """(metrics, gradients by role, frozen) of a step that trains attention alone."""
    state, frozen = worlds.fresh(algorithm), dict(worlds.start(algorithm)[1])
    parts = {role: split(tree, attention) for role, tree in state.params.items()}
    params = {role: trained for role, (trained, _) in parts.items()}
    frozen |= {role: rest for role, (_, rest) in parts.items()}
    state = state._replace(params=params, opt={role: worlds.SGD.init(tree) for role, tree in params.items()})
    batch = worlds.data(algorithm)
    if mesh is not None:
        state, batch = jax.device_put(state, worlds.shardings(mesh, state)), put_batch(batch, mesh)
        frozen = jax.device_put(frozen, param_shardings(mesh, frozen))
    step = make_train_step(
        objective or worlds.objective(algorithm), dict.fromkeys(params, worlds.SGD), grad_accum_steps=accum
    )
    new, metrics = jax.block_until_ready(jax.jit(step, compiler_options=worlds.COMPILER)(state, frozen, batch))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    return metrics, jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, new.params), frozen


def assert_masked(found, algorithm):
    """Attention's gradients are the whole model's, and so is every metric but the norms."""
    metrics, gradients = worlds.expected(algorithm)
    wanted = {role: split(tree, attention)[0] for role, tree in gradients.items()}
    assert len(jax.tree.leaves(wanted)) == 4 * len(wanted)
    chex.assert_trees_all_close(found[1], wanted, rtol=1e-9, atol=1e-9)
    same = [name for name in metrics if "norm" not in name]
    chex.assert_trees_all_close({n: found[0][n] for n in same}, {n: metrics[n] for n in same}, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("algorithm", worlds.ALGORITHMS)
def test_training_a_part_is_training_the_whole_masked(algorithm, x64):
    assert_masked(of_part(algorithm, accum=4), algorithm)


def test_on_eight_devices(x64):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        found = of_part("dpo", mesh=mesh)
    assert_masked(found, "dpo")


def test_evaluation_statistics_and_items_see_the_whole_model(x64):
    params, batch = worlds.start("sft")[0], worlds.data("sft")
    trained, rest = split(params["policy"], attention)
    step = jax.jit(make_eval_step(worlds.objective("sft")), compiler_options=worlds.COMPILER)
    chex.assert_trees_all_close(step({"policy": trained}, {"policy": rest}, {}, batch), step(params, {}, {}, batch))

    plain, seen = worlds.objective("sft"), []

    def look(params, *_):
        seen.append(jax.tree.structure(params["policy"]))
        return jnp.float64(0)

    def items(params, frozen, extra, batch):
        look(params)
        rows = jnp.arange(len(batch.rows.tokens))
        return {role: rows * jnp.sum(own["norm"]["scale"]) for role, own in params.items()}

    terms = lambda given, *_: Sums({"policy": jnp.sum(given["policy"])})  # noqa: E731
    of_part("sft", accum=4, objective=Objective(plain.weights, terms, statistics=look, items=items))
    assert len(seen) > 2 and set(seen) == {jax.tree.structure(params["policy"])}


def test_a_reference_that_shares_the_frozen_part(x64):
    """The reference is the start of what is trained, joined with the very arrays that the policy is joined with."""
    params, batch = worlds.start("dpo")[0], worlds.data("dpo")
    trained, rest = split(params["policy"], attention)
    frozen = {"policy": rest, "ref": join(jax.tree.map(jnp.copy, trained), rest)}
    assert joined({"policy": trained}, frozen)["policy"]["norm"]["scale"] is frozen["ref"]["norm"]["scale"]
    step = jax.jit(make_eval_step(worlds.objective("dpo")), compiler_options=worlds.COMPILER)
    total, weight = step({"policy": trained}, frozen, {}, batch)["rewards/margins"]
    assert total == 0 and weight > 0

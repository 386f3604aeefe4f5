"""float32 products are asked for in full, forward and backward, wherever a platform would round them by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.attention import attention
from jaxalign.steps.preference import preference_objective
from jaxalign.steps.sft import sft_objective
from jaxalign.steps.step import make_eval_step
from tests.steps.layouts import examples, lay, tiny_model

HIGHEST = jax.lax.Precision.HIGHEST


def products(jaxpr):
    """The precision of each `dot_general` of a program, inner programs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params["precision"]
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from products(getattr(value, "jaxpr", value))


def step_products(algorithm, dtype):
    model = tiny_model("lm", dtype=dtype)
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = lay([[e] for e in examples(2, 1 if algorithm == "sft" else 2)])
    if algorithm == "sft":
        objective = sft_objective(model.apply, model.head, entropy=True)
    else:
        objective = preference_objective(
            model.apply, model.head, loss="sigmoid", beta=0.1, label_smoothing=0.0, reference="live"
        )

    def loss(params, ref):
        return make_eval_step(objective)({"policy": params}, {"ref": ref}, {}, batch)["loss"][0]

    return list(products(jax.make_jaxpr(jax.grad(loss))(params, params).jaxpr))


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_every_product_of_a_step(algorithm):
    found = step_products(algorithm, "float32")
    assert len(found) > 20
    assert set(found) == {(HIGHEST, HIGHEST)}
    assert set(step_products(algorithm, "bfloat16")) == {None}


@pytest.mark.parametrize("backend", ["plain", "blocked"])
def test_attention(backend):
    q, kv = jnp.zeros((1, 160, 4, 8)), jnp.zeros((1, 160, 2, 8))
    start, end = jnp.zeros((1, 160), jnp.int32), jnp.arange(1, 161, dtype=jnp.int32)[None]

    def total(q, k, v):
        return attention(q, k, v, start, end, backend=backend).sum()

    found = list(products(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(q, kv, kv).jaxpr))
    assert len(found) >= 5 and set(found) == {(HIGHEST, HIGHEST)}


def test_a_stated_default_is_left_to_decide():
    with jax.default_matmul_precision("tensorfloat32"):
        found = set(step_products("sft", "float32"))
    assert (HIGHEST, HIGHEST) not in found and len(found) == 1
    np.testing.assert_equal(jax.config.jax_default_matmul_precision, None)

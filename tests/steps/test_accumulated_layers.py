"""Gradients of micro-batches: those of layers are added up where the sum lies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.steps.objective import Objective, Sums
from jaxalign.steps.step import make_train_step
from jaxalign.train.compiled import memory_of
from jaxalign.types import TrainState
from tests.models import tiny_models as tiny
from tests.steps import worlds

ROWS, LENGTH = 4, 16
SGD = optax.sgd(1.0)


def model(param_dtype="float32"):
    whole = tiny.model(hidden_size=64, intermediate_size=256, num_hidden_layers=16, tie_word_embeddings=False)
    return dataclasses.replace(whole, config=dataclasses.replace(whole.config, param_dtype=param_dtype, remat="full"))


def objective(model):
    """The sum of squared hidden states and logits of rows of tokens [B, T]."""

    def squares(params, frozen, extra, statistics, tokens):
        own = params["policy"]
        rows = tiny.causal(np.zeros(tokens.shape, np.int32))._replace(tokens=tokens)
        hidden, _, _ = model.apply(own, rows)
        logits = (hidden @ model.head(own)).astype(jnp.float32)
        return Sums({"policy": jnp.sum(jnp.square(hidden.astype(jnp.float32))) + jnp.sum(jnp.square(logits))})

    return Objective(lambda tokens: {"policy": jnp.float32(tokens.size)}, squares)


def compiled(model, accum, rows, state):
    step = make_train_step(objective(model), {"policy": SGD}, grad_accum_steps=accum)
    tokens = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
    return jax.jit(step, donate_argnums=0, compiler_options=worlds.COMPILER).lower(state, {}, tokens).compile()


def test_a_sum_of_layers_gradients_needs_no_second_copy():
    """A micro-batch's own gradients, kept beside the sum, would be a second copy of the parameters."""
    policy = model()
    params = policy.abstract()
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(scalar, {"policy": params}, {"policy": jax.eval_shape(SGD.init, params)}, {}, scalar)
    size = sum(4 * x.size for x in jax.tree.leaves(params["layers"]))
    one, four = (memory_of(compiled(policy, n, n, state))["temporary"] / size for n in (1, ROWS))
    print(one, four)
    assert four < one + 0.3


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_they_are_the_micro_batches_own_in_float32(param_dtype):
    """Also of parameters in bfloat16, and with layers trained in part."""
    policy = model(param_dtype)
    params = jax.jit(policy.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, policy.config.vocab_size, (ROWS, LENGTH), np.int32)
    attention = {name: leaf for name, leaf in params["layers"].items() if name == "attention"}
    trained = {"layers": attention, "norm": params["norm"]}
    rest = {k: v for k, v in params.items() if k != "norm"}
    rest["layers"] = {name: leaf for name, leaf in params["layers"].items() if name != "attention"}
    state = TrainState(jnp.int32(0), {"policy": trained}, {"policy": SGD.init(trained)}, {}, jnp.int32(0))

    def gradient(accum):
        found = {}

        def keep(updates, state, params=None):
            found.update(updates)
            return jax.tree.map(jnp.zeros_like, updates), state

        spy = optax.GradientTransformation(SGD.init, keep)

        def step(state, frozen, tokens):
            make_train_step(objective(policy), {"policy": spy}, grad_accum_steps=accum)(state, frozen, tokens)
            return found

        return jax.jit(step, compiler_options=worlds.COMPILER)(state, {"policy": rest}, tokens)

    def alone(own, row):
        whole = jax.tree.map(lambda x: x, rest) | {"norm": own["norm"]}
        whole["layers"] = rest["layers"] | own["layers"]
        return objective(policy).terms({"policy": whole}, {}, {}, None, row).terms["policy"] / tokens.size

    of_row = jax.jit(jax.grad(alone), compiler_options=worlds.COMPILER)
    rows = [jax.tree.map(lambda g: g.astype(jnp.float32), of_row(trained, tokens[i : i + 1])) for i in range(ROWS)]
    expected = jax.tree.map(lambda *gradients: sum(gradients), *rows)
    found = gradient(ROWS)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert mine.dtype == jnp.float32
        tolerance = 1e-5 if param_dtype == "float32" else 2e-2
        assert np.linalg.norm(mine - theirs) <= tolerance * np.linalg.norm(theirs)

"""The lookup of token vectors: values, and gradients that keep the digits of frequent tokens, on any mesh."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.embedding import lookup
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, put_batch

V, D, B, T = 24, 16, 8, 512


def world(dtype):
    """A table, tokens of which one is nine tenths, and a gradient that does not cancel."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((B, T)) < 0.9, 5, rng.integers(0, V, (B, T))).astype(np.int32)
    table = rng.normal(size=(V, D)).astype(dtype)
    return table, tokens, rng.uniform(0.5, 1.5, (B, T, D))


def gradient(table, tokens, d_x, dtype):
    def loss(table):
        return jnp.sum(lookup(table, tokens, dtype).astype(jnp.float32) * d_x.astype(jnp.float32))

    return jax.grad(loss)(table)


def expected(tokens, d_x):
    out = np.zeros((V, D))
    np.add.at(out, tokens, d_x)
    return out


def test_trap_frequent_tokens_keep_their_digits():
    """Thousands of terms, added in bfloat16, stop growing at 256 times their size."""
    table, tokens, d_x = world(np.float32)
    d_x = np.asarray(jnp.asarray(d_x, jnp.bfloat16), np.float64)  # the terms themselves are exact
    found = gradient(jnp.asarray(table), tokens, jnp.asarray(d_x), "bfloat16")
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(tokens, d_x), rtol=1e-5)


def test_values_are_rows_of_the_table():
    table, tokens, _ = world(np.float32)
    np.testing.assert_array_equal(lookup(jnp.asarray(table), tokens, "float32"), table[tokens])
    half = lookup(jnp.asarray(table), tokens, "bfloat16")
    np.testing.assert_array_equal(half, jnp.asarray(table).astype(jnp.bfloat16)[tokens])


def test_of_bfloat16_parameters():
    table, tokens, d_x = world(np.float32)
    found = gradient(jnp.asarray(table, jnp.bfloat16), tokens, jnp.ones_like(d_x), "bfloat16")
    assert found.dtype == jnp.bfloat16
    counts = expected(tokens, np.ones_like(d_x))
    np.testing.assert_array_equal(found, jnp.asarray(counts).astype(jnp.bfloat16))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 1, 8), (1, 4, 2), (4, 2, 1)])
def test_every_mesh_gives_the_same(sizes, x64):
    table, tokens, d_x = world(np.float64)
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    sharding = param_shardings(mesh, {"embed": {"embedding": table}})["embed"]["embedding"]
    rows = put_batch((tokens, d_x), mesh)
    with jax.set_mesh(mesh):
        split = jax.device_put(table, sharding)
        x = jax.jit(lambda table, tokens: lookup(table, tokens, "float64"))(split, rows[0])
        np.testing.assert_array_equal(x, table[tokens])

        def loss(table, tokens, d_x):
            return jnp.sum(lookup(table, tokens, "float64") * d_x)

        found = jax.jit(jax.grad(loss), out_shardings=sharding)(split, *rows)
    np.testing.assert_allclose(found, expected(tokens, d_x), rtol=1e-13)


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2), (1, 8, 1)])
def test_trap_tokens_past_the_vocabulary_are_loud_on_every_mesh(sizes):
    """Split over `tensor` they were zeros, which train on without a word."""
    table, tokens, d_x = world(np.float32)
    tokens = tokens.copy()
    tokens[0, :3], tokens[1, :2] = [len(table), 10**6, -1], [-len(table), -len(table) - 1]
    plain = lookup(table, tokens, "float32")
    assert np.isnan(plain).any(-1).sum() == np.isnan(plain).all(-1).sum() == 3
    weighted = lambda table, tokens, d_x: jnp.nansum(lookup(table, tokens, "float32") * d_x)  # noqa: E731
    gradient = jax.grad(weighted)(table, tokens, d_x)
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    sharding = param_shardings(mesh, {"embed": {"embedding": table}})["embed"]["embedding"]
    rows = put_batch((tokens, d_x), mesh)
    with jax.set_mesh(mesh):
        split = jax.device_put(table, sharding)
        np.testing.assert_array_equal(jax.jit(lambda *x: lookup(*x, "float32"))(split, rows[0]), plain)
        found = jax.jit(jax.grad(weighted), out_shardings=sharding)(split, *rows)
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_divide_are_left_to_the_compiler():
    table, tokens, _ = world(np.float32)
    with jax.set_mesh(make_mesh({"fsdp": 8})):
        x = jax.jit(lambda table, tokens: lookup(table, tokens, "float32"))(table, tokens[:3])
    np.testing.assert_array_equal(x, table[tokens[:3]])


def test_the_table_does_not_move():
    """Two all-to-alls of vectors; tokens are gathered, 4 bytes each; neither the table nor its gradient moves."""
    table, tokens, d_x = world(np.float32)
    mesh = make_mesh({"fsdp": 8})
    sharding = param_shardings(mesh, {"embed": {"embedding": table}})["embed"]["embedding"]
    with jax.set_mesh(mesh):
        rows = put_batch((tokens, d_x.astype(np.float32)), mesh)
        step = jax.jit(lambda *args: gradient(*args, "float32"), out_shardings=sharding)
        text = step.lower(jax.device_put(table, sharding), *rows).compile().as_text()
    found = Counter(re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", text))
    assert found["all-to-all"] >= 1
    assert not found["all-reduce"] and not found["reduce-scatter"]
    assert all("s32" in line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line))

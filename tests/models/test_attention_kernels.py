"""Attention that each device does by itself (kernels, run step by step on a CPU, and short rows), against the plain
backend: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import problem

from jaxalign.ops import attention_splash
from jaxalign.ops.attention import BACKENDS, attention
from jaxalign.parallel.mesh import make_mesh

KERNELS = ("splash", "triton", "short")
ALL_KINDS = ("causal", "window", "packed", "pair", "random")


def both_ways(backend, start, end, weight):
    """Output and gradients of q, k and v."""

    def run(q, k, v):
        out, back = jax.vjp(functools.partial(attention, start_BT=start, end_BT=end, backend=backend), q, k, v)
        return out, *back(weight.astype(out.dtype))

    return jax.jit(run)


def check(backend, args, dtype=jnp.float32, mesh=None):
    """The backend's distance from the plain one in float32, by norm, is that of rounding."""
    *x, start, end = args
    x = [jnp.asarray(a, dtype) for a in x]
    weight = jnp.asarray(np.random.default_rng(9).normal(size=x[0].shape), jnp.float32)
    wanted = both_ways("plain", start, end, weight)(*(a.astype(jnp.float32) for a in x))
    if mesh is None:
        found = both_ways(backend, start, end, weight)(*x)
    else:
        with jax.set_mesh(mesh):
            found = both_ways(backend, start, end, weight)(*x)
    most = 2e-6 if dtype == jnp.float32 else 2**-7
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= most * np.linalg.norm(b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("backend", KERNELS)
def test_equals_plain_with_gradients(backend, dtype):
    """Every kind of interval, several blocks of which some are skipped, lengths that no block divides, shared keys."""
    check(backend, problem(np.random.default_rng(0), 5, 300, 300, 4, 2, 32, *ALL_KINDS), dtype)


@pytest.mark.parametrize(
    "T, S, N, K, H", [(21, 21, 6, 2, 24), (140, 200, 3, 3, 16), (200, 140, 2, 1, 16), (1, 9, 2, 1, 8)]
)
@pytest.mark.parametrize("backend", KERNELS)
def test_other_shapes(backend, T, S, N, K, H):
    """Short ones, more keys than queries and the other way round, heads of a size that is no power of two."""
    check(backend, problem(np.random.default_rng(T), 2, T, S, N, K, H, "random"))


def test_splash_in_several_blocks_and_calls(monkeypatch):
    """Several blocks a row, and fewer slots a call than the rows take."""
    monkeypatch.setattr(attention_splash, "_BLOCK", 128)
    monkeypatch.setattr(attention_splash, "LIMIT", 2 * 384)
    assert attention_splash._rows_of_a_call(4, 384) == 2
    check("splash", problem(np.random.default_rng(1), 4, 384, 384, 2, 1, 16, "pair", "packed", "random", "window"))


def test_splash_refuses_rows_beyond_its_limit():
    x = jnp.zeros((1, attention_splash.LIMIT + 1, 1, 8))
    at = jnp.zeros(x.shape[:2], jnp.int32)
    with pytest.raises(ValueError, match="at most 32768"):
        jax.eval_shape(functools.partial(attention, backend="splash"), x, x, x, at, at + 1)


def test_splash_fetches_nothing_for_blocks_that_it_skips():
    """A skipped step names the next block that is needed, or stays with the last."""
    touch = jnp.array([[[0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]])
    np.testing.assert_array_equal(attention_splash._next_touched(touch, 2)[0], [[1, 1, 3, 3, 3], [4, 4, 4, 4, 4]])
    np.testing.assert_array_equal(attention_splash._next_touched(touch, 1)[0], [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("backend", KERNELS)
def test_on_a_mesh(backend, kv_heads):
    """Rows over an axis and heads over another, the key heads as many as its devices or fewer."""
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 4})
    check(backend, problem(np.random.default_rng(2), 2, 40, 40, 8, kv_heads, 16, "pair", "packed"), mesh=mesh)


@pytest.mark.parametrize("backend", KERNELS)
def test_on_a_mesh_that_does_not_divide(backend):
    """Three rows on four devices, three heads on two: each device does all of them."""
    mesh = make_mesh({"data": 4, "fsdp": 1, "tensor": 2})
    check(backend, problem(np.random.default_rng(3), 3, 40, 40, 3, 1, 16, "pair"), mesh=mesh)


@pytest.mark.parametrize("rows, length, kv_heads", [(5, 300, 2), (8, 193, 1), (3, 100, 4), (2, 9, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_causal_rows(rows, length, kv_heads, dtype):
    """Two blocks and four, the last shorter; rows and heads in parts, rows that no part divides."""
    kinds = ("causal", "window", "packed")
    check("causal", problem(np.random.default_rng(length), rows, length, length, 4, kv_heads, 16, *kinds), dtype)


def test_causal_rows_on_a_mesh():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    check("causal", problem(np.random.default_rng(4), 8, 120, 120, 4, 2, 16, "packed", "window"), mesh=mesh)


@pytest.mark.parametrize("backend", ["short", "causal", "blocked"])
@pytest.mark.parametrize("shape", [(8, 256, 4, 64), (2, 112, 8, 32), (5, 97, 2, 20)])
def test_a_pass_without_gradients_gives_the_same_bits(backend, shape):
    """A frozen reference against the policy that starts as its copy: DPO's first rewards are exactly 0."""
    B, T, N, H = shape
    *x, start, end = problem(np.random.default_rng(6), B, T, T, N, N // 2, H, "causal")
    x = [jnp.asarray(3 * a, jnp.float32) for a in x]
    run = functools.partial(attention, start_BT=start, end_BT=end, backend=backend)
    alone = jax.jit(run)(*x)
    with_gradients = both_ways(backend, start, end, jnp.ones(x[0].shape))(*x)[0]
    np.testing.assert_array_equal(alone, with_gradients)


@pytest.mark.parametrize("backend", ["plain", "short"])
def test_keys_in_another_order(backend):
    """Keys and values shuffled within each row, intervals as they were: the same answers, gradients that go along."""
    rng = np.random.default_rng(7)
    q, k, v, start, end = problem(rng, 4, 120, 120, 4, 2, 16, "pair", "random")
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    slots = np.argsort(rng.random((4, 120)), axis=1).astype(np.int32)
    weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def run(q, k, v, **order):
        out, back = jax.vjp(lambda *x: attention(*x, start, end, backend=backend, **order), q, k, v)
        return out, *back(weight)

    moved = lambda x: jnp.take_along_axis(x, slots[:, :, None, None], axis=1)  # noqa: E731
    out, d_q, d_k, d_v = run(q, k, v)
    for a, b in zip(run(q, moved(k), moved(v), slots_BS=slots), (out, d_q, moved(d_k), moved(d_v)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_backend_that_knows_no_other_order_says_so():
    x, at = jnp.zeros((1, 4, 1, 8)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="'blocked' takes keys in the order of their numbers"):
        attention(x, x, x, at, at + 1, slots_BS=at, backend="blocked")


def test_a_row_that_is_not_causal_is_loud():
    """A query that sees keys which were left out gets NaN, all others what they are due; so do gradients."""
    *x, start, end = problem(np.random.default_rng(5), 2, 200, 200, 2, 2, 8, "causal")
    end[1, 20], end[1, 30] = 56, 57  # of a block of 56 queries and keys
    weight = jnp.ones(x[0].shape)
    x = [jnp.asarray(a, jnp.float32) for a in x]
    out, *gradients = both_ways("causal", start, end, weight)(*x)
    wanted = both_ways("plain", start, end, weight)(*x)[0]
    assert np.isnan(out[1, 30]).all()
    others = np.ones(out.shape[:2], bool)
    others[1, 30] = False
    np.testing.assert_allclose(np.asarray(out)[others], np.asarray(wanted)[others], atol=1e-5)
    assert all(np.isnan(g[1]).any() and np.isfinite(g[0]).all() for g in gradients)


def test_splash_leaves_a_chosen_precision_alone():
    assert attention_splash._precision_name("float32") == "highest"
    with jax.default_matmul_precision("bfloat16"):
        assert attention_splash._precision_name("float32") == "bfloat16"


def test_every_backend_is_checked():
    assert set(BACKENDS) == {"plain", "blocked", "causal", *KERNELS, "mosaic"}  # in test_attention_mosaic.py

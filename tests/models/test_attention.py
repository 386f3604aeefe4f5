"""Attention: every backend against a loop over queries, values and gradients."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny

from jaxalign.errors import InputError
from jaxalign.models.transformer import Model
from jaxalign.ops import attention as attention_module
from jaxalign.ops import attention_blocked
from jaxalign.ops.attention import BACKENDS, attention, choose_backend
from jaxalign.types import CausalByIndex, CausalByPosition

IN_XLA = ("blocked", "plain", "short")  # those made of XLA's products, in any dtype; the others are kernels


def loop(q, k, v, start, end):
    """Query by query, head by head."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        keys = slice(start[b, t], end[b, t])
        scores = k[b, keys, n // group] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, keys, n // group] / weights.sum()
    return out


def problem(rng, B, T, S, N, K, H, *kinds):
    """Random numbers and the intervals of each row's kind, in turn."""
    q, k, v = (rng.normal(size=s) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    rows = [intervals(rng, T, S, kinds[b % len(kinds)]) for b in range(B)]
    start, end = (np.stack(x).astype(np.int32) for x in zip(*rows, strict=True))
    return q, k, v, start, end


def intervals(rng, T, S, kind):
    t, third = np.arange(T), T // 3
    if kind == "causal":
        return 0 * t, t + 1
    if kind == "window":
        return np.maximum(t - 3, 0), t + 1
    if kind == "packed":
        return t // 5 * 5, t + 1
    if kind == "pair":  # reversed(chosen) + prompt + rejected
        return np.where(t < third, t, third), np.where(t < third, 2 * third, t + 1)
    start = rng.integers(0, S, T)
    return start, start + 1 + rng.integers(0, S, T) % (S - start)


def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_blocked, "_cpu_blocks", lambda length: (8, 16))


@pytest.mark.parametrize("backend", IN_XLA)
def test_equals_a_loop(backend, x64, monkeypatch):
    small_blocks(monkeypatch)
    args = problem(np.random.default_rng(0), 5, 21, 21, 6, 2, 4, "causal", "window", "packed", "pair", "random")
    out = jax.jit(functools.partial(attention, backend=backend))(*args)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, loop(*args), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "T, S, N, K, kind",
    [(40, 40, 4, 2, "pair"), (37, 24, 3, 3, "random"), (1, 9, 2, 1, "random")],
)
def test_blocked_equals_plain_with_gradients(T, S, N, K, kind, x64, monkeypatch):
    """Lengths that blocks divide and that they do not, more queries than keys and the other way round."""
    small_blocks(monkeypatch)
    rng = np.random.default_rng(T)
    q, k, v, start, end = problem(rng, 2, T, S, N, K, 4, kind)
    weight = rng.normal(size=q.shape)

    @jax.jit
    def both(q, k, v):
        def loss(q, k, v, backend):
            return jnp.sum(weight * jnp.sin(attention(q, k, v, start, end, backend=backend)))

        return [jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v, b) for b in ("plain", "blocked")]

    for a, b in zip(*map(jax.tree.leaves, both(q, k, v)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_gradient_equals_differences(x64, monkeypatch):
    """Along one random direction, by central differences."""
    small_blocks(monkeypatch)
    rng = np.random.default_rng(3)
    *x, start, end = problem(rng, 1, 19, 19, 2, 1, 4, "pair")
    direction = [rng.normal(size=a.shape) for a in x]
    f = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.cos(attention(*x, start, end, backend="blocked")))))
    ahead, behind = (f([a + s * 1e-5 * d for a, d in zip(x, direction, strict=True)])[0] for s in (1, -1))
    along = sum(float(jnp.vdot(g, d)) for g, d in zip(f(x)[1], direction, strict=True))
    assert along == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-7)


@pytest.fixture
def stepped(backend):
    """Mosaic kernels have an interpreter to themselves."""
    if backend != "mosaic":
        yield
        return
    from mosaic_interpreter import interpreted  # late: it takes seconds

    with interpreted():
        yield


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_trap_empty_interval_is_loud(backend, stepped, monkeypatch):
    """TRAPS.md: an empty interval averages all keys without a word. Here it gives NaN, and only there."""
    small_blocks(monkeypatch)
    q, k, v, start, end = problem(np.random.default_rng(0), 1, 12, 12, 2, 2, 4, "causal")
    end = end.copy()
    end[0, 5] = 0
    dtype = jnp.bfloat16 if backend == "mosaic" else jnp.float32
    args = (*(jnp.asarray(x, dtype) for x in (q, k, v)), start, end)
    out = np.asarray(jax.jit(functools.partial(attention, backend=backend))(*args), np.float32)
    assert np.isnan(out[0, 5]).all()
    assert np.isfinite(np.delete(out, 5, axis=1)).all()


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_softmax_is_float32_for_narrow_inputs(backend, stepped, monkeypatch):
    """Scores near 300 differ by less than bfloat16 can tell."""
    dtype = jnp.bfloat16
    small_blocks(monkeypatch)
    q, k, v, start, end = problem(np.random.default_rng(0), 1, 20, 20, 2, 1, 4, "causal")
    q, k, v = (jnp.asarray(x * s, dtype) for x, s in ((q, 20), (k, 20), (v, 1)))
    out = jax.jit(functools.partial(attention, backend=backend))(q, k, v, start, end)
    wide = loop(*(np.asarray(x, np.float64) for x in (q, k, v)), start, end)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), wide, rtol=0, atol=0.03)


def test_blocked_holds_no_square():
    """No array of T x S numbers in the compiled program, forward or backward."""
    T = 1024
    shapes = [jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((1, T), jnp.int32)] * 2
    grad = jax.jit(jax.grad(lambda *a: attention(*a, backend="blocked").sum(), argnums=(0, 1, 2)))
    compiled = grad.lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T * 4 / 2


def test_choice_and_errors():
    assert choose_backend(1, 2048, "float32") == "plain"
    assert choose_backend(513, 513, "float32") == "blocked"
    assert choose_backend(512, 512, "float32") == "short"
    assert choose_backend(96, 96, "float64", causal=True) == "causal"
    assert choose_backend(128, 256, "float32", causal=True) == "short"  # fewer queries, or a cache with earlier tokens
    x = jnp.zeros((1, 2, 3, 4))
    at = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="3 query heads in 2 groups"):
        attention(x, x[:, :, :2], x[:, :, :2], at, at + 1)
    with pytest.raises(KeyError):
        attention(x, x, x, at, at + 1, backend="none")


@pytest.mark.parametrize(
    "platform, length, dtype, capability, expected",
    [
        ("tpu", 2048, "bfloat16", None, "splash"),
        ("tpu", 2**15, "float32", None, "splash"),
        ("tpu", 2**15 + 128, "bfloat16", None, "blocked"),  # more than the kernel's 16 bits
        ("tpu", 2048, "float64", None, "blocked"),
        ("tpu", 64, "bfloat16", None, "plain"),
        ("gpu", 2048, "bfloat16", "9.0", "triton"),
        ("gpu", 2048, "float32", "9.0", "triton"),
        ("gpu", 2048, "bfloat16", "8.6", "triton"),
        ("gpu", 2048, "float16", "7.5", "blocked"),  # older than Ampere
        ("gpu", 2048, "bfloat16", None, "triton"),  # not there: compiled for
    ],
)
def test_choice_by_platform(platform, length, dtype, capability, expected, monkeypatch):
    monkeypatch.setattr(attention_module, "platform", lambda: platform)
    device = types.SimpleNamespace(**({"compute_capability": capability} if capability else {}))
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert choose_backend(length, length, dtype) == expected
    assert choose_backend(length, length, dtype, asked="mosaic") == ("plain" if expected == "plain" else "mosaic")


@pytest.mark.parametrize(
    "asked, platform, dtype, head_dim, expected",
    [
        ("splash", "gpu", "float32", 64, "a TPU"),
        ("triton", "cpu", "float32", 64, "an NVIDIA GPU"),
        ("mosaic", "gpu", "float32", 64, "bfloat16 or float16"),
        ("mosaic", "gpu", "bfloat16", 192, "heads of at most 128"),
    ],
)
def test_a_backend_that_the_device_does_not_run_is_refused(asked, platform, dtype, head_dim, expected):
    device = types.SimpleNamespace(platform=platform, device_kind="some device")
    with pytest.raises(InputError, match=expected) as told:
        attention_module.require_backend(asked, device, dtype, head_dim)
    assert f"model.attention={asked} on some device in {dtype}" in str(told.value)
    attention_module.require_backend("blocked", device, dtype, head_dim)
    attention_module.require_backend(None, device, dtype, head_dim)


@pytest.mark.parametrize(
    "asked, causal, expected",
    [
        (None, (), "short"),
        (None, CausalByIndex(), "causal"),
        (None, CausalByPosition(), "causal"),
        ("blocked", CausalByIndex(), "blocked"),
        ("blocked", CausalByPosition(), "blocked"),
    ],
)
def test_the_model_takes_what_rows_promise_and_what_is_asked_for(asked, causal, expected, monkeypatch):
    model = Model(tiny.model().config, asked)
    rows = tiny.causal(np.zeros((1, 100), np.int32))._replace(causal=causal)
    taken = []
    for name, backend in list(BACKENDS.items()):
        monkeypatch.setitem(
            BACKENDS, name, lambda *args, n=name, b=backend, **options: (taken.append(n), b(*args, **options))[1]
        )
    jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0)), rows)[0])
    assert set(taken) == {expected}

"""Scale, soft cap and window of attention: against a loop over queries and keys, values and gradients; the chooser."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import problem, small_blocks

from jaxalign.errors import InputError
from jaxalign.models.position_order import sort_rows
from jaxalign.ops import attention as attention_module
from jaxalign.ops.attention import BACKENDS, CAPABILITIES, attention, choose_backend, require_backend
from jaxalign.types import Rows

OPTIONS = [{"scale": 0.31}, {"softcap": 0.8}, {"window": 4}, {"scale": 0.31, "softcap": 0.8, "window": 4}]


def loop(q, k, v, start, end, positions, *, scale=None, softcap=None, window=None):
    """Query by query, head by head, key by key; and the gradients of `sum(weight * out)`, by hand.

    d out / d score_s = p_s (v_s - out), d score / d product = scale (1 - tanh^2).
    """
    B, T, N, H = q.shape
    weight = weights_of(q)
    out, d_q, d_k, d_v = (np.zeros(x.shape) for x in (q, q, k, v))
    scale = H**-0.5 if scale is None else scale
    for b, t, n in np.ndindex(B, T, N):
        g = n // (N // k.shape[2])
        seen = [s for s in range(start[b, t], end[b, t])
                if window is None or positions[b, t] - positions[b, s] < window]  # fmt: skip
        z = np.array([scale * sum(q[b, t, n, h] * k[b, s, g, h] for h in range(H)) for s in seen])
        slope = np.ones_like(z) if softcap is None else 1 / np.cosh(z / softcap) ** 2
        z = z if softcap is None else softcap * np.tanh(z / softcap)
        p = np.exp(z - z.max())
        p /= p.sum()
        out[b, t, n] = sum(p_s * v[b, s, g] for p_s, s in zip(p, seen, strict=True))
        for p_s, s, slope_s in zip(p, seen, slope, strict=True):
            d_product = p_s * (weight[b, t, n] @ (v[b, s, g] - out[b, t, n])) * slope_s * scale
            d_q[b, t, n] += d_product * k[b, s, g]
            d_k[b, s, g] += d_product * q[b, t, n]
            d_v[b, s, g] += p_s * weight[b, t, n]
    return out, d_q, d_k, d_v


def weights_of(q):
    return np.random.default_rng(9).normal(size=q.shape)


def both_ways(backend, positions, options, q, k, v, start, end):
    """Output and gradients of q, k and v."""
    more = {"positions": (positions, positions)} if "window" in options else {}
    run = functools.partial(attention, start_BT=start, end_BT=end, backend=backend, **options, **more)
    out, back = jax.vjp(run, q, k, v)
    return out, *back(weights_of(q).astype(out.dtype))


def positions_of(kind, T):
    """As the layouts make them: a pair's first completion lies before its prompt, in reverse."""
    t, third = np.arange(T), T // 3
    if kind == "packed":
        return t % 5
    return np.where(t < third, 2 * third - 1 - t, t - third) if kind == "pair" else t


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["plain", "blocked", "short"])
def test_equals_a_loop_with_gradients(backend, options, x64, monkeypatch):
    """Causal, packed and pair rows, several blocks, shared keys; on pair rows a window is no interval."""
    small_blocks(monkeypatch)
    kinds = ("causal", "packed", "pair")
    args = problem(np.random.default_rng(0), 3, 21, 21, 4, 2, 4, *kinds)
    positions = np.stack([positions_of(kind, 21) for kind in kinds]).astype(np.int32)
    found = jax.jit(functools.partial(both_ways, backend, positions, options))(*args)
    for a, b in zip(found, loop(*args, positions, **options), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_by_position_see_the_same(options, x64):
    """Pairs sorted by position, whose attention leaves keys out: "causal" with slots."""
    q, k, v, start, end = problem(np.random.default_rng(1), 2, 120, 120, 2, 1, 4, "pair")
    positions = np.stack([positions_of("pair", 120)] * 2).astype(np.int32)
    wanted = both_ways("plain", positions, options, q, k, v, start, end)
    rows, slots, places = sort_rows(Rows(positions, positions, start, end))
    turned = [jnp.take_along_axis(jnp.asarray(x), slots[..., None, None], axis=1) for x in (q, k, v)]
    weight = jnp.take_along_axis(weights_of(q), slots[..., None, None], axis=1)
    more = {"positions": (rows.positions, rows.positions)} if "window" in options else {}
    run = functools.partial(
        attention, start_BT=rows.attend_start, end_BT=rows.attend_end, slots_BS=slots, backend="causal",
        **options, **more,
    )  # fmt: skip
    out, back = jax.vjp(run, *turned)
    for a, b in zip((out, *back(weight)), wanted, strict=True):
        np.testing.assert_allclose(jnp.take_along_axis(a, places[..., None, None], axis=1), b, rtol=0, atol=1e-9)


def test_a_window_of_each_layer_is_a_number_of_the_scan(x64):
    """Layers of one program whose windows differ."""
    q, k, v, start, end = problem(np.random.default_rng(2), 1, 30, 30, 2, 1, 4, "pair")
    positions = positions_of("pair", 30)[None].astype(np.int32)
    one = functools.partial(attention, q, k, v, start, end, positions=(positions, positions), backend="blocked")
    windows = np.array([2, 7, 10**6])
    found = jax.lax.scan(lambda _, window: (None, one(window=window)), None, windows)[1]
    for window, out in zip(windows.tolist(), found, strict=True):
        np.testing.assert_allclose(out, one(window=window), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[2], attention(q, k, v, start, end), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"scale": 0.31}, {"softcap": 0.8}, {"scale": 0.3, "softcap": 2.0}])
@pytest.mark.parametrize("backend", ["splash", "triton"])
def test_kernels_equal_plain_with_gradients(backend, options):
    """In the interpreter, in float32."""
    args = problem(np.random.default_rng(3), 2, 140, 140, 2, 1, 16, "pair", "packed")
    q, k, v = (jnp.asarray(x, jnp.float32) for x in args[:3])
    wanted, found = (both_ways(b, None, options, q, k, v, *args[3:]) for b in ("plain", backend))
    for a, b in zip(found, wanted, strict=True):
        assert np.linalg.norm(a - b) <= 4e-6 * np.linalg.norm(b)


def test_mosaic_takes_a_scale():
    from mosaic_interpreter import interpreted  # late: it takes seconds

    args = problem(np.random.default_rng(4), 1, 20, 20, 2, 1, 16, "pair")
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in args[:3])
    with interpreted():
        found = attention(q, k, v, *args[3:], scale=0.31, backend="mosaic")
    wanted = attention(*(x.astype(jnp.float32) for x in (q, k, v)), *args[3:], scale=0.31)
    assert np.linalg.norm(found.astype(jnp.float32) - wanted) <= 2**-7 * np.linalg.norm(wanted)


def test_each_backend_says_what_it_can():
    assert CAPABILITIES.keys() == BACKENDS.keys()
    x, at = jnp.zeros((1, 2, 2, 4), jnp.float32), jnp.zeros((1, 2), jnp.int32)
    asked = {"softcap": {"softcap": 2.0}, "window": {"window": 2, "positions": (at, at)}}
    for backend, (feature, options) in itertools.product(CAPABILITIES, asked.items()):
        if not getattr(CAPABILITIES[backend], feature):
            with pytest.raises(InputError, match=feature):
                attention(x, x, x, at, at + 1, backend=backend, **options)
    with pytest.raises(ValueError, match="positions"):
        attention(x, x, x, at, at + 1, window=2)


@pytest.mark.parametrize("platform, plainly", [("cpu", "blocked"), ("tpu", "splash"), ("gpu", "triton")])
def test_a_backend_that_cannot_is_never_chosen(platform, plainly, monkeypatch):
    monkeypatch.setattr(attention_module, "platform", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace()])
    assert choose_backend(2048, 2048, "bfloat16") == plainly
    for softcap, window in itertools.product((False, True), repeat=2):
        can = CAPABILITIES[choose_backend(2048, 2048, "bfloat16", softcap=softcap, window=window)]
        assert can.softcap >= softcap and can.window >= window and platform in can.platforms
        can = CAPABILITIES[choose_backend(256, 256, "float32", causal=True, softcap=softcap, window=window)]
        assert can.softcap >= softcap and can.window >= window and platform in can.platforms


@pytest.mark.parametrize("backend, feature", [("mosaic", "softcap"), ("mosaic", "window"), ("splash", "window")])
def test_a_backend_that_cannot_and_is_asked_for_is_refused(backend, feature):
    device = types.SimpleNamespace(platform=CAPABILITIES[backend].platforms[0], device_kind="some device")
    require_backend(backend, device, "bfloat16", 64)
    with pytest.raises(InputError, match=feature) as told:
        require_backend(backend, device, "bfloat16", 64, **{feature: True})
    assert "blocked" in str(told.value)
    with pytest.raises(InputError, match=feature):
        choose_backend(2048, 2048, "bfloat16", asked=backend, **{feature: True})

"""Kernels in 8 and 4 bits, against NF4's definition, loops, QLoRA's own scheme; products and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.ops.linear import linear
from jaxalign.ops.low_rank import LowRank, adapted
from jaxalign.ops.quantised import BLOCK, GROUP, NF4, Quantised, dequantise, quantise

SHAPES = [((64, 4, 8), 0), ((256, 96), 0), ((96, 256), 1), ((3, 5, 200), 2), ((77, 3), 0), ((1, 3), 0)]


def kernel_of(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.05


def again(kernel, kind, dim, dtype=jnp.float32):
    parts = jax.tree.map(jnp.asarray, quantise(kernel, kind, dim))
    return np.asarray(dequantise(Quantised(parts, dim, kernel.shape[dim]), dtype))


def num_bytes(kernel, kind, dim):
    return sum(x.nbytes for x in quantise(kernel, kind, dim).values()) / kernel.size


def test_nf4_is_what_qlora_defines():
    """Quantiles of a normal distribution, 8 up and 7 down from 0, whose ends are 1 - (1/32 + 1/30) / 2 (section 3)."""
    from statistics import NormalDist

    end = 1 - (1 / 32 + 1 / 30) / 2
    up = [NormalDist().inv_cdf(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    down = [-NormalDist().inv_cdf(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    levels = np.sort([*up, 0.0, *down]) / max(up)
    np.testing.assert_allclose(NF4, levels, rtol=0, atol=2e-7)


def blocks_of(kernel, dim):
    """Rows of one block each, in the order of the array of scales."""
    turned = np.moveaxis(kernel, dim, 0)
    for start in range(0, len(turned), BLOCK):
        block = turned[start : start + BLOCK]
        yield start, block


@pytest.mark.parametrize("shape, dim", SHAPES)
def test_int8_equals_a_loop(shape, dim):
    kernel = kernel_of(shape)
    wanted = np.zeros_like(np.moveaxis(kernel, dim, 0))
    for start, block in blocks_of(kernel, dim):
        for place in np.ndindex(block.shape[1:]):
            column = block[(slice(None), *place)]
            scale = np.float32(np.max(np.abs(column)) / np.float32(127))
            for i, number in enumerate(column):
                wanted[(start + i, *place)] = np.float32(np.rint(number / scale)) * scale
    found = again(kernel, "int8", dim)
    np.testing.assert_array_equal(np.moveaxis(found, dim, 0), wanted)
    assert np.abs(found - kernel).max() <= np.abs(kernel).max() / 253


@pytest.mark.parametrize("shape, dim", SHAPES)
def test_nf4_equals_a_loop(shape, dim):
    kernel = kernel_of(shape)
    parts = quantise(kernel, "nf4", dim)
    # Scales: each group of 256 blocks, in the order of their array, from its least to its largest in 255 steps.
    largest = np.stack([np.abs(block).max(axis=0) for _, block in blocks_of(kernel, dim)])
    largest = np.moveaxis(largest, 0, dim)
    flat, scales = largest.reshape(-1), np.zeros(largest.size, np.float32)
    for start in range(0, flat.size, GROUP):
        group = flat[start : start + GROUP]
        step = (group.max() - group.min()) / np.float32(255)
        for i, number in enumerate(group):
            code = np.rint((number - group.min()) / step) if step else 0
            assert parts["scales"].reshape(-1)[start + i] == code
            scales[start + i] = group.min() + np.float32(code) * step
    scales = np.moveaxis(scales.reshape(largest.shape), dim, 0)
    # Codes: the nearest of 16 levels, two of neighbours in a byte.
    codes, found = np.moveaxis(parts["codes"], dim, 0), np.moveaxis(again(kernel, "nf4", dim), dim, 0)
    turned = np.moveaxis(kernel, dim, 0)
    assert codes.shape[0] == (shape[dim] + 1) // 2
    for place in np.ndindex(turned.shape):
        scale = scales[(place[0] // BLOCK, *place[1:])]
        code = (int(codes[(place[0] // 2, *place[1:])]) >> 4 * (place[0] % 2)) & 15
        nearest = np.abs(np.array(NF4) - turned[place] / scale)
        assert nearest[code] <= nearest.min() + 1e-6
        np.testing.assert_allclose(found[place], np.float32(NF4[code]) * scale, rtol=3e-7)


@pytest.mark.parametrize("kind, most", [("int8", 1.0625), ("nf4", 0.53)])
def test_bytes_of_a_parameter_scales_included(kind, most):
    assert num_bytes(kernel_of((64, 8, 8)), kind, 0) <= most
    assert num_bytes(kernel_of((1024, 8, 16)), kind, 0) <= most
    found = num_bytes(kernel_of((300, 1024)), kind, 1)
    # 4,800 scales, of NF4 in 19 groups.
    assert found == {"int8": 1 + 4 / 64, "nf4": 0.5 + 1 / 64 + 2 * 4 * 19 / (300 * 1024)}[kind]


def by_qlora(kernel):
    """Blocks of 64, scales less their mean in 8 bits by 256 with one float32, numbers by the exact scales."""
    blocks = kernel.T.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    codes = np.abs(np.array(NF4) - (blocks / largest[:, None])[..., None]).argmin(axis=-1)
    mean, scales = largest.mean(), np.zeros_like(largest)
    for start in range(0, len(largest), GROUP):
        group = largest[start : start + GROUP] - mean
        far = np.abs(group).max()
        scales[start : start + GROUP] = np.rint(group / far * 127) / 127 * far + mean
    return (np.array(NF4)[codes] * scales[:, None]).reshape(kernel.shape[::-1]).T


def test_nf4_is_no_further_from_the_kernel_than_qloras_double_quantisation():
    kernel = kernel_of((512, 256)) * np.exp(kernel_of((1, 256), 1) * 20)
    mine, theirs = (np.sqrt(np.mean((x - kernel) ** 2)) for x in (again(kernel, "nf4", 0), by_qlora(kernel)))
    assert mine <= theirs
    assert mine / np.sqrt(np.mean(kernel**2)) < 0.1


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from(["int8", "nf4"]), st.integers(1, 130), st.integers(1, 5))
def test_representable_numbers_come_back(data, kind, length, others):
    """A kernel of levels times one scale, which each block reaches, is kept as it is."""
    scale = np.float32(data.draw(st.floats(2.0**-20, 2.0**20, width=32)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    levels = np.arange(-127, 128, dtype=np.float32) if kind == "int8" else np.array(NF4, np.float32)
    kernel = rng.choice(levels, size=(length, others))
    kernel[::BLOCK] = levels.max()
    np.testing.assert_allclose(again(kernel * scale, kind, 0), kernel * scale, rtol=1e-6)


def test_zeros_and_the_edge_of_float32():
    for kind in ("int8", "nf4"):
        assert not np.any(again(np.zeros((70, 3), np.float32), kind, 0))
        huge = np.full((70, 3), np.float32(3e38))
        np.testing.assert_allclose(again(huge, kind, 0), huge, rtol=1e-6)
        assert np.isfinite(again(np.full((70, 3), np.float32(1e-45)), kind, 0)).all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_jax_and_numpy_agree(kind):
    kernel = kernel_of((130, 6, 4))
    one, other = quantise(kernel, kind, 0), jax.jit(lambda x: quantise(x, kind, 0))(jnp.asarray(kernel))
    for name, x in one.items():
        assert x.dtype == other[name].dtype
        if name != "codes":  # to the last bit of float32; NF4's scales are whole numbers, which are the same
            np.testing.assert_array_max_ulp(x.astype(np.float32), np.asarray(other[name], np.float32), maxulp=1)
    assert np.mean(one["codes"] != np.asarray(other["codes"])) < 1e-3


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_products_and_gradients_are_those_of_the_dequantised_kernel(kind, dora):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, w = jnp.asarray(rng.normal(size=(2, 5, 70))), kernel_of((70, 3, 4))
        a, b, m = (jnp.asarray(rng.normal(size=s)) for s in ((70, 2), (2, 3, 4), (3, 4)))
        kernel = Quantised(jax.tree.map(jnp.asarray, quantise(w, kind, 0)), 0, 70)
        plain = dequantise(kernel, jnp.float64)
        update = LowRank(a, b, m if dora else None)
        mine = lambda x, u: jnp.sum(jnp.sin(adapted(x, kernel, u, 1)))  # noqa: E731
        theirs = lambda x, u: jnp.sum(jnp.sin(adapted(x, plain, u, 1)))  # noqa: E731
        for found, wanted in zip(
            jax.tree.leaves(jax.grad(mine, (0, 1))(x, update)),
            jax.tree.leaves(jax.grad(theirs, (0, 1))(x, update)),
            strict=True,
        ):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(linear(x, kernel, 1), linear(x, plain, 1))


def test_no_kernel_is_kept_for_the_backward_pass():
    kernel = Quantised(jax.tree.map(jnp.asarray, quantise(kernel_of((128, 256)), "nf4", 0)), 0, 128)
    _, back = jax.vjp(lambda x: linear(x, kernel, 1), jnp.ones((1, 2, 128)))
    assert max(x.nbytes for x in jax.tree.leaves(back)) == 128 * 256 // 2

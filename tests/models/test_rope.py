"""Rotary embeddings: the frequencies of each type, and what the rotation must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.config import from_hf
from jaxalign.models.identity import describe
from jaxalign.models.transformer import Model
from jaxalign.ops import rope
from jaxalign.ops.rope import Rope, frequencies, rotate, rotations
from tests.models.tiny_models import SETTINGS, causal, golden, hf_config

LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_32 = LLAMA_31 | {"factor": 32.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 39,
}
# For sequences of up to `SETTINGS["rope_length"]`, 40.
# name -> config fields, in the older and the newer form; the golden file has transformers' own frequencies
CASES = {
    "default": {"rope_theta": 10000.0, "rope_parameters": None},
    "default_new": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear": {"rope_theta": 10000.0, "rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama31": {"rope_theta": 500000.0, "rope_parameters": None, "rope_scaling": LLAMA_31, "head_dim": 128},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        "max_position_embeddings": 16,
    },
    "longrope": {"rope_parameters": LONG, "head_dim": 8},
    "longrope_within": {"rope_parameters": LONG | {"original_max_position_embeddings": 40}, "head_dim": 8},
    "llama32": {"rope_parameters": LLAMA_32 | {"rope_theta": 500000.0}, "head_dim": 64},
}


@pytest.mark.parametrize("case", CASES)
def test_trap_rope_scaling_equals_transformers(case):
    """TRAPS.md: rope scaling left out turns by about a radian too much at position 1,024."""
    config = from_hf(hf_config(**CASES[case]), **SETTINGS)
    mine, theirs = frequencies(config.rope, config.head_dim), golden("rope")[case]
    np.testing.assert_allclose(mine, theirs, rtol=5e-7)  # theirs is computed in float32
    if case.startswith("llama3"):
        assert abs(mine - frequencies(Rope(theta=config.rope.theta), config.head_dim)).max() * 1024 > 0.5


def test_llama3_by_hand():
    """Wavelengths below 2048, above 8192 and between, worked out one by one."""
    rope = Rope("llama3", 500000.0, 8.0, 1.0, 4.0, 8192)
    for i, got in enumerate(frequencies(rope, 128)):
        freq = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * np.pi / freq
        if wavelength < 8192 / 4:
            expected = freq
        elif wavelength > 8192 / 1:
            expected = freq / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * freq / 8 + smooth * freq
        assert got == pytest.approx(expected, rel=1e-14)


def test_products_depend_on_distance_alone(x64):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 8))
    freq = frequencies(Rope(), 8)

    def product(at_q, at_k):
        turned = [
            rotate(jnp.asarray(x), *rotations(jnp.array([[p]]), freq, jnp.float64)) for x, p in ((q, at_q), (k, at_k))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-12)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-3)


def test_dims_that_do_not_turn_stay_as_they_are(x64):
    """Of eight dims four turn, as a head of four would."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 8)))
    freq = frequencies(Rope(dims=4), 8)
    np.testing.assert_array_equal(freq, frequencies(Rope(), 4))
    rotation = rotations(jnp.array([[5, 70, 900]]), freq, jnp.float64)
    found = rotate(x, *rotation)
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(found[..., :4], rotate(x[..., :4], *rotation))


def test_the_longest_sequence_is_stated_or_asked_for():
    """`dynamic` and `longrope`: beyond the original length nothing is computed from a length that nobody gave."""
    unstated = SETTINGS | {"rope_length": None}
    model = Model(from_hf(hf_config(**CASES["dynamic"]), **unstated))
    with pytest.raises(ValueError, match="for_length"):
        jax.eval_shape(model.apply, model.abstract(), causal(np.zeros((1, 17))))
    jax.eval_shape(model.apply, model.abstract(), causal(np.zeros((1, 16))))
    stated = model.for_length(17)
    assert stated.config.rope.length == 17 and stated.for_length(400) is stated
    jax.eval_shape(stated.apply, model.abstract(), causal(np.zeros((1, 32))))
    short = model.for_length(5).config
    np.testing.assert_array_equal(frequencies(short.rope, 8), frequencies(Rope(), 8))
    jax.eval_shape(Model(short).apply, model.abstract(), causal(np.zeros((1, 32))))  # padding is no sequence
    plain = Model(from_hf(hf_config(), **SETTINGS))
    assert plain.for_length(10_000) is plain and plain.config.rope.length is None
    assert describe(stated.config) != describe(short)


def test_narrow_inputs_are_turned_in_float32():
    """In bfloat16 position 1,000 itself would already be rounded."""
    freq = frequencies(Rope(), 8)
    cos, sin = rotations(jnp.array([[1001]]), freq, jnp.bfloat16)
    assert cos.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, 0], np.cos(1001 * freq), atol=1e-4)
    assert rotate(jnp.ones((1, 1, 1, 8), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


@pytest.mark.parametrize("dims", [None, 6])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_tpus_form_is_the_same(dtype, dims, monkeypatch, x64):
    """Values and gradients to rounding: the exchange of halves by a product moves numbers and adds nothing."""
    rng = np.random.default_rng(0)
    x, d_y = (jnp.asarray(rng.normal(size=(2, 5, 3, 8)), dtype) for _ in range(2))
    freq = rope.frequencies(rope.Rope(dims=dims), 8)
    rotation = rope.rotations(jnp.asarray(rng.integers(0, 1000, (2, 5))), freq, x.dtype)

    def both():
        y, back = jax.vjp(lambda x: rope.rotate(x, *rotation), x)
        return y, back(d_y)[0]

    expected = both()
    monkeypatch.setattr(rope, "platform", lambda: "tpu")
    for found, known in zip(both(), expected, strict=True):
        assert found.dtype == known.dtype
        tolerance = {"bfloat16": 1e-2, "float32": 1e-6, "float64": 1e-14}[dtype]
        np.testing.assert_allclose(np.float64(found), np.float64(known), rtol=tolerance, atol=tolerance)

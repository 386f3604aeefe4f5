"""Readouts against the dense formula: values, gradients, memory, collectives."""

import contextlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.ops import vocabulary
from jaxalign.ops.attention_scores import Scores
from jaxalign.ops.logits import Head
from jaxalign.ops.readout import completion_sums, pairs, scalar_readout, token_logprobs, weighted_logprobs
from jaxalign.parallel.mesh import make_mesh
from jaxalign.types import CHOSEN, REJECTED, SINGLE, Completions, Readouts

B, T, D, V, M = 8, 6, 16, 24, 11
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def case(dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head = jnp.asarray(rng.normal(size=(D, V)), dtype)
    source, target = rng.integers(0, T, (B, M)), rng.integers(0, V, (B, M))
    readouts = Readouts(*(jnp.asarray(x, jnp.int32) for x in (source, target, 0 * source)), rng.random((B, M)) < 0.8)
    cotangents = jnp.asarray(rng.normal(size=(2, B, M)), dtype)
    return hidden, head, readouts, cotangents


def dense(hidden, head, readouts, temperature):
    """Every logit at every place, then picked."""
    logits = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, head) / temperature)
    at = jnp.arange(B)[:, None], readouts.source
    entropy = -jnp.sum(jnp.exp(logits) * logits, axis=-1)
    return (
        jnp.where(readouts.mask, logits[(*at, readouts.target)], 0),
        jnp.where(readouts.mask, entropy[at], 0),
    )


def values_and_grads(fn, cotangents):
    def scalar(hidden, head):
        out = fn(hidden, head)
        return sum(jnp.sum(c * x) for c, x in zip(cotangents, out, strict=False)), out

    return jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))


@pytest.mark.parametrize("max_logits", [2**27, 4 * B * V, 5 * B * V, 1], ids=["whole", "chunks", "ragged", "single"])
def test_equals_the_dense_formula(max_logits, x64):
    hidden, head, readouts, g = case()
    expected = values_and_grads(lambda h, w: dense(h, w, readouts, 0.7), g)(hidden, head)
    found = values_and_grads(
        lambda h, w: token_logprobs(h, w, readouts, temperature=0.7, entropy=True, max_logits=max_logits), g
    )(hidden, head)
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("made", [Scores(0.3), Scores(1.0, 2.0), Scores(0.3, 0.7)])
@pytest.mark.parametrize("max_logits", [2**27, 4 * B * V], ids=["whole", "chunks"])
def test_logits_are_scaled_and_capped(max_logits, made, x64):
    """As a whole and in chunks, whose logits are made again for the gradient: scaled, then capped, then divided."""
    hidden, head, readouts, g = case()

    def capped(h, w):
        z = made.scale * h @ w
        z = z if made.softcap is None else made.softcap * jnp.tanh(z / made.softcap)
        return dense(z, jnp.eye(V), readouts, 0.7)

    def ours(h, w):
        return token_logprobs(h, Head(w, made), readouts, temperature=0.7, entropy=True, max_logits=max_logits)

    expected, found = (values_and_grads(f, g)(hidden, head) for f in (capped, ours))
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


def test_without_entropy(x64):
    hidden, head, readouts, g = case()
    logprobs, entropy = token_logprobs(hidden, head, readouts)
    assert entropy is None
    np.testing.assert_allclose(logprobs, dense(hidden, head, readouts, 1.0)[0], rtol=1e-12)
    expected = values_and_grads(lambda h, w: dense(h, w, readouts, 1.0)[:1], g)(hidden, head)[1]
    found = values_and_grads(lambda h, w: token_logprobs(h, w, readouts)[:1], g)(hidden, head)[1]
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


def test_by_hand():
    """Two tokens with logits (log 3, 0): probabilities 3/4 and 1/4, entropy log 4 - 3/4 log 3."""
    hidden, head = jnp.array([[[1.0]]]), jnp.array([[np.log(3.0), 0.0]])
    zero = jnp.zeros((1, 2), jnp.int32)
    readouts = Readouts(zero, jnp.array([[0, 1]]), zero, jnp.ones((1, 2), bool))
    logprobs, entropy = token_logprobs(hidden, head, readouts, entropy=True)
    np.testing.assert_allclose(logprobs, np.log([[0.75, 0.25]]), rtol=1e-6)
    np.testing.assert_allclose(entropy, [[np.log(4) - 0.75 * np.log(3)] * 2], rtol=1e-6)


@pytest.mark.parametrize("axes", MESHES)
def test_sharded_equals_single_device(axes, x64):
    hidden, head, readouts, g = case()
    fn = lambda h, w: token_logprobs(h, w, readouts, temperature=0.7, entropy=True, max_logits=V * 4)  # noqa: E731
    expected = values_and_grads(fn, g)(hidden, head)
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), axes, strict=True)))
    with jax.set_mesh(mesh):
        h = jax.device_put(hidden, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        w = jax.device_put(head, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
        found = values_and_grads(fn, g)(h, w)
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", [None, (1, 4, 2)])
def test_a_gpu_gathers_what_others_compare(axes, monkeypatch, x64):
    """Targets in every shard of the vocabulary."""
    hidden, head, readouts, g = case()
    fn = lambda h, w: token_logprobs(h, w, readouts, entropy=True, max_logits=V * 4)  # noqa: E731
    expected = values_and_grads(fn, g)(hidden, head)
    monkeypatch.setattr(vocabulary, "platform", lambda: "gpu")
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), axes, strict=True))) if axes else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        found = values_and_grads(fn, g)(hidden, head)
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", [None, *MESHES, (1, 4, 2)])
@pytest.mark.parametrize("max_logits", [2**27, V * 4], ids=["whole", "chunks"])
@pytest.mark.parametrize("made", [None, Scores(0.3, 0.7)])
def test_a_weighted_sum_is_that_of_the_logprobs(axes, max_logits, made, x64):
    """Values and gradients, times a factor, as of a sum of `token_logprobs`; some weights are 0, some negative."""
    hidden, head, readouts, (weights, _) = case()
    weights = jnp.where(weights > 0.9, 0, weights)

    def plain(h, w):
        logprobs, entropy = token_logprobs(h, Head(w, made), readouts, entropy=True)
        return -0.3 * jnp.sum(weights * logprobs), (logprobs, entropy)

    def ours(h, w):
        options = {"entropy": True, "max_logits": max_logits}
        total, logprobs, entropy = weighted_logprobs(h, Head(w, made), readouts, weights, **options)
        return -0.3 * total + jnp.sum(logprobs) - jnp.sum(jax.lax.stop_gradient(logprobs)), (logprobs, entropy)

    expected = jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, head)
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), axes, strict=True))) if axes else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        alone = jax.jit(ours)(hidden, head)
        found = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    chex.assert_trees_all_close(alone, expected[0], rtol=1e-12, atol=1e-12)
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


def test_dims_that_the_mesh_does_not_divide(x64):
    """23 tokens over 2, 15 dims over 2, 7 rows over 4: what does not divide stays whole."""
    hidden, head, readouts, g = case()
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for rows, dim, width in ((8, 15, 24), (8, 16, 23), (7, 15, 23)):
        h, w = hidden[:rows, :, :dim], head[:dim, :width]
        r = jax.tree.map(lambda x, n=rows: x[:n], readouts)
        r = r._replace(target=r.target % width)
        fn = lambda h, w, r=r: token_logprobs(h, w, r, entropy=True)  # noqa: E731
        expected = values_and_grads(fn, g[:, :rows])(h, w)
        with jax.set_mesh(mesh):
            found = values_and_grads(fn, g[:, :rows])(h, w)
        chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


def collectives(hlo: str) -> dict[str, int]:
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    return {k: len(re.findall(rf"= [^=]*? {k}(?:-start)?\(", hlo)) for k in kinds}


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ((8, 1, 1), {"all-reduce": 1}),  # the head's gradient
        ((1, 8, 1), {"all-gather": 1, "reduce-scatter": 1}),  # the head, its gradient
        ((4, 2, 1), {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 1}),
    ],
)
def test_trap_collectives_are_the_heads_alone(axes, expected):
    """However many chunks there are; and none for the gather of hidden states, forward or backward."""
    hidden, head, readouts, g = case("float32")
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), axes, strict=True)))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        h, r, g = jax.device_put((hidden, readouts, jnp.moveaxis(g, 0, -1)), rows)
        w = jax.device_put(head, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))

        def gradients(h, w, r, g):
            return jax.grad(lambda h, w: jnp.sum(g[..., 0] * token_logprobs(h, w, r, max_logits=V * 3)[0]), (0, 1))(
                h, w
            )

        shardings = (h.sharding, w.sharding)
        found = collectives(jax.jit(gradients, out_shardings=shardings).lower(h, w, r, g).compile().as_text())
    assert {k: n for k, n in found.items() if n} == expected


def sizes(jaxpr):
    """The number of elements of every array in a jaxpr and those inside it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield int(np.prod(variable.aval.shape))
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("weighted", [False, True])
def test_trap_no_array_of_all_logits(weighted):
    """Neither [B, T, V] nor [B, M, V], forward or backward, in the program or in the compiler's temporaries."""
    rows, length, dim, vocabulary, m = 4, 256, 8, 4096, 256
    hidden = jax.ShapeDtypeStruct((rows, length, dim), jnp.float32)
    head = jax.ShapeDtypeStruct((dim, vocabulary), jnp.float32)
    index = jax.ShapeDtypeStruct((rows, m), jnp.int32)
    readouts = Readouts(index, index, index, jax.ShapeDtypeStruct((rows, m), jnp.bool_))
    budget = rows * 16 * vocabulary

    def loss(h, w, r):
        if weighted:
            return weighted_logprobs(h, w, r, jnp.ones((rows, m)), entropy=True, max_logits=budget)[0]
        return sum(map(jnp.sum, token_logprobs(h, w, r, entropy=True, max_logits=budget)))

    gradients = jax.grad(loss, (0, 1))
    assert max(sizes(jax.make_jaxpr(gradients)(hidden, head, readouts).jaxpr)) <= budget
    memory = jax.jit(gradients).lower(hidden, head, readouts).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * budget * 4 < rows * m * vocabulary * 4 / 3


def test_masked_places_are_zero_and_pull_at_nothing():
    hidden, head, readouts, _ = case("float32")
    readouts = readouts._replace(mask=jnp.zeros((B, M), bool), source=readouts.source + 1000)
    value, gradients = jax.value_and_grad(
        lambda h, w: sum(map(jnp.sum, token_logprobs(h, w, readouts, entropy=True))), (0, 1)
    )(hidden, head)
    assert value == 0
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_stay_finite(scale):
    hidden, head, readouts, _ = case("float32")
    value, gradients = jax.value_and_grad(
        lambda h, w: sum(map(jnp.sum, token_logprobs(h, w, readouts, entropy=True))), (0, 1)
    )(hidden, head * scale)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trap_logprobs_of_16_bit_states_are_float32(dtype):
    """Equal to float32 arithmetic on the same 16-bit numbers; gradients keep their parameters' dtype."""
    hidden, head, readouts, g = case(dtype)
    fn = lambda h, w: token_logprobs(h, w, readouts, entropy=True, max_logits=B * V * 2)  # noqa: E731
    (_, (logprobs, entropy)), gradients = values_and_grads(fn, g.astype(jnp.float32))(hidden, head)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    assert all(x.dtype == dtype for x in gradients)
    wide = values_and_grads(lambda h, w: dense(h, w, readouts, 1.0), g.astype(jnp.float32))
    (_, expected), expected_gradients = wide(hidden.astype(jnp.float32), head.astype(jnp.float32))
    np.testing.assert_allclose(logprobs, expected[0], rtol=2e-6, atol=2e-6)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(found.astype(np.float32) - exact) < 1e-2 * np.linalg.norm(exact)


def test_trap_head_gradient_is_accumulated_in_float32():
    """A thousand chunks' gradients added in bfloat16 would stop growing."""
    m = 1024
    hidden, head = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)
    zero = jnp.zeros((1, m), jnp.int32)
    readouts = Readouts(zero, zero, zero, jnp.ones((1, m), bool))
    gradient = jax.grad(lambda w: token_logprobs(hidden, w, readouts, max_logits=2)[0].sum())(head)
    np.testing.assert_array_equal(gradient.astype(np.float32), [[512.0, -512.0]])


def test_scalar_readout_is_at_least_float32(x64):
    hidden, _, readouts, _ = case()
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(D, 1)))
    expected = [
        [float(hidden[b, readouts.source[b, m]] @ kernel[:, 0]) * bool(readouts.mask[b, m]) for m in range(M)]
        for b in range(B)
    ]
    np.testing.assert_allclose(scalar_readout(hidden, kernel, readouts), expected, rtol=1e-12)
    narrow = scalar_readout(hidden.astype(jnp.bfloat16), kernel.astype(jnp.float32), readouts)
    assert narrow.dtype == jnp.float32
    exact = scalar_readout(hidden.astype(jnp.bfloat16).astype(jnp.float64), kernel.astype(jnp.float32), readouts)
    np.testing.assert_allclose(narrow, exact, rtol=1e-5, atol=1e-5)


def test_completion_sums_equal_a_loop(x64):
    rng = np.random.default_rng(0)
    values, completion = rng.normal(size=(B, M)), rng.integers(0, 3, (B, M))
    mask = rng.random((B, M)) < 0.7
    zero = np.zeros((B, M), np.int32)
    found = completion_sums(jnp.where(mask, values, jnp.nan), Readouts(zero, zero, jnp.asarray(completion), mask), 3)
    expected = np.zeros((B, 3))
    for b, m in zip(*np.nonzero(mask), strict=True):
        expected[b, completion[b, m]] += values[b, m]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_trap_pairs_are_found_by_role_and_number_not_by_order():
    completions = Completions(
        pair=jnp.array([[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1]]),
        role=jnp.array([[REJECTED, CHOSEN, REJECTED, CHOSEN], [CHOSEN, REJECTED, CHOSEN, SINGLE], [CHOSEN] * 4]),
        weight=jnp.ones((3, 4)),
        ref_logprob=jnp.zeros((3, 4)),
        score=jnp.zeros((3, 4)),
        mask=jnp.array([[True] * 4, [True, True, True, True], [False] * 4]),
    )
    values = jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [jnp.nan] * 4])
    found = pairs(values, completions)
    np.testing.assert_array_equal(found["chosen"], [[2, 4], [5, 0], [0, 0]])
    np.testing.assert_array_equal(found["rejected"], [[3, 1], [6, 0], [0, 0]])
    np.testing.assert_array_equal(found["mask"], [[True, True], [True, False], [False, False]])


def test_wrong_shapes_are_refused():
    hidden, head, readouts, _ = case("float32")
    with pytest.raises(ValueError, match=r"\[D, V\]"):
        token_logprobs(hidden, head.T, readouts)
    with pytest.raises(ValueError, match=r"\[D, 1\]"):
        scalar_readout(hidden, head, readouts)

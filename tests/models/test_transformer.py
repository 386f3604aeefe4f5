"""The transformer against plain numpy, and what its result must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Block, Model
from jaxalign.ops.logits import logits
from jaxalign.types import Rows
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES

WIDE = {"dtype": "float64", "param_dtype": "float64"}


def params_of(model: Model, seed=0):
    """Parameters that make every part count: norms not 1, biases not 0."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        value = rng.normal(size=leaf.shape)
        return jnp.asarray(1 + 0.1 * value if "norm" in str(path) else 0.3 * value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, model.abstract())


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, rows, weights):
    """A loss that reads the hidden states where `weights` are not 0."""

    def loss(params):
        hidden = model.apply(params, rows)[0]
        return jnp.sum(jax.nn.log_softmax(logits(hidden, model.head(params)))[..., 7] * weights)

    return jax.value_and_grad(loss)(params)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, rows, cache=None):
    return model.apply(params, rows, cache)


def assert_close(a, b, atol=1e-9):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=atol)


def numpy_forward(config, weights, tokens, positions, start, end):
    """One row, straight from the formulas, by Hugging Face names."""

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weights[name]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    angles = np.outer(positions, config.rope.theta ** (-np.arange(0, H, 2) / H))

    def rotated(x):
        pairs = x[..., : H // 2] + 1j * x[..., H // 2 :]
        pairs = pairs * np.exp(1j * angles)[:, None]
        return np.concatenate([pairs.real, pairs.imag], -1)

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config.num_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (linear(h, f"{at}self_attn.{p}_proj").reshape(len(tokens), -1, H) for p in "qkv")
        q, k = rotated(q), rotated(k)
        out = np.zeros_like(q)
        for t, n in np.ndindex(*q.shape[:2]):
            scores = k[start[t] : end[t], n * K // N] @ q[t, n] / np.sqrt(H)
            w = np.exp(scores - scores.max())
            out[t, n] = w / w.sum() @ v[start[t] : end[t], n * K // N]
        x = x + linear(out.reshape(len(tokens), -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = linear(h, at + "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    return norm(x, "model.norm.weight")


def test_equals_numpy_in_float64(x64):
    """Nothing is cast below its input, or this would fail at 1e-12."""
    model = tiny.model(attention_bias=True, mlp_bias=True, head_dim=6, **WIDE)
    params = params_of(model)
    by_name = tiny.by_name(model.config, params)
    tokens = np.random.default_rng(0).integers(0, 64, 9)
    positions, start, end = np.array([5, 4, 3, 0, 1, 2, 3, 9, 0]), np.array([0, 1, 2, 3, 3, 3, 3, 2, 8]), [4] * 9
    end = np.array([6, 6, 6, 4, 5, 6, 7, 9, 9])
    rows = Rows(*(np.asarray(x, np.int32)[None] for x in (tokens, positions, start, end)))
    hidden = forward(model, params, rows)[0]
    assert hidden.dtype == jnp.float64
    expected = numpy_forward(model.config, by_name, tokens, positions, start, end)
    np.testing.assert_allclose(hidden[0], expected, rtol=0, atol=1e-12)


def test_remat_changes_nothing(x64):
    """At a length that attention cuts into blocks; float64, 1e-9."""
    tokens = np.random.default_rng(0).integers(0, 64, (1, 100))
    rows, weights = tiny.causal(tokens), np.ones((1, 100))
    results = []
    for remat in ("none", "dots", "attention", "offload", "full"):
        model = tiny.model(remat=remat, **WIDE)
        results.append(loss_and_grads(model, params_of(model), rows, weights))
    for result in results[1:]:
        assert_close(results[0], result)


def kept_by(remat):
    """What layers keep for the backward pass: (shape, whether it lies in the host's memory) of each array."""
    model, rows = tiny.model(remat=remat), tiny.causal(np.zeros((1, 100), np.int32))
    loss = lambda params: jnp.sum(model.apply(params, rows)[0])  # noqa: E731
    program = jax.make_jaxpr(jax.grad(loss))(model.abstract()).jaxpr
    forward = next(e for e in program.eqns if e.primitive.name == "scan")
    kept = [x.aval for x in forward.outvars[1:]]
    return sorted((x.shape[1:], x.memory_space == jax.memory.Space.Host) for x in kept)


def test_policies_keep_what_they_say():
    # Dims D 32, F 48, N 4, K 2, H 8, G 2 queries of a key head.
    layer_input, products = (1, 100, 32), [*[(1, 100, 32)] * 2, *[(1, 100, 16)] * 2, *[(1, 100, 48)] * 2]
    attention = [(1, 100, 2, 2, 8)]
    assert kept_by("full") == [(layer_input, False)]
    assert kept_by("dots") == sorted((x, False) for x in [layer_input, *products, *attention])
    heads = [(1, 100, 4, 8), *[(1, 100, 2, 8)] * 2, (1, 100, 32)]  # q, k, v and the projection, without the mlp's
    assert kept_by("attention") == sorted((x, False) for x in [layer_input, *heads, *attention])
    assert kept_by("offload") == sorted([(layer_input, False), *((x, True) for x in products + attention)])


def test_trap_padding_side_amount_and_id(x64):
    """TRAPS.md: results are the same for any padding side, amount and id, values and gradients."""
    model = tiny.model(**WIDE)
    params = params_of(model)
    tokens = np.random.default_rng(1).integers(0, 64, (2, 7))
    weight = np.random.default_rng(2).normal(size=(2, 7))

    def run(left, right, pad_id):
        rows = tiny.causal(tokens, left, right, pad_id)
        return loss_and_grads(model, params, rows, np.pad(weight, ((0, 0), (left, right))))

    alone = run(0, 0, 0)
    for left, right, pad_id in [(5, 0, 0), (0, 5, 0), (2, 3, 63), (2, 3, int(tokens[0, -1])), (5, 0, 2)]:
        assert_close(alone, run(left, right, pad_id))


def test_trap_packing_contamination(x64):
    """TRAPS.md: packed equals unpacked; and a pair that shares its prompt equals two rows."""
    model = tiny.model(**WIDE)
    params = params_of(model)
    rng = np.random.default_rng(3)
    prompt, chosen, rejected = (rng.integers(0, 64, (1, n)) for n in (4, 3, 5))
    weight = [rng.normal(size=(1, n)) for n in (3, 5)]
    # All of them padded to the packed length: one compiled program.
    alone = [
        loss_and_grads(
            model, params, tiny.causal(np.concatenate([prompt, c], 1), 0, pad), np.pad(w, ((0, 0), (4, pad)))
        )
        for c, w, pad in ((chosen, weight[0], 9), (rejected, weight[1], 7))
    ]
    expected = jax.tree.map(jnp.add, *alone)
    packed = np.concatenate([prompt, chosen, prompt, rejected], 1)
    start = [0] * 7 + [7] * 9
    positions = [*range(7), *range(9)]
    weights = np.concatenate([np.zeros((1, 4)), weight[0], np.zeros((1, 4)), weight[1]], 1)
    rows = Rows(packed, *(np.asarray(x, np.int32)[None] for x in (positions, start, range(1, 17))))
    assert_close(expected, loss_and_grads(model, params, rows, weights))

    shared = np.concatenate([chosen[:, ::-1], prompt, rejected, np.zeros((1, 4), int)], 1)
    positions = [6, 5, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]
    start, end = [0, 1, 2] + [3] * 9 + [12, 13, 14, 15], [7, 7, 7, *range(4, 17)]
    # A prompt token must not see the chosen completion, though it stands before: its interval starts at the prompt.
    weights = np.concatenate([weight[0][:, ::-1], np.zeros((1, 4)), weight[1], np.zeros((1, 4))], 1)
    rows = Rows(shared, *(np.asarray(x, np.int32)[None] for x in (positions, start, end)))
    assert_close(expected, loss_and_grads(model, params, rows, weights))


def test_decode_equals_the_full_forward():
    """Ragged prompts padded on the left, a prefill, then token by token; a cache longer than needed."""
    model = tiny.model(rope_parameters=tiny.VARIANTS["one_key_llama3"]["rope_parameters"])
    params = params_of(model)
    B, P, R, S = 3, 6, 5, 14
    tokens = np.random.default_rng(0).integers(3, 64, (B, P + R)).astype(np.int32)
    pad = np.array([[0], [3], [5]])
    slot = np.arange(P + R)[None]
    real = slot >= pad
    rows = Rows(
        tokens,
        *(np.where(real, a, b).astype(np.int32) for a, b in ((slot - pad, 0), (pad, slot), (slot + 1, slot + 1))),
    )
    full = forward(model, params, rows)[0]
    cache = tiny.empty_cache(model.config, B, S)
    part, cache, _ = forward(model, params, jax.tree.map(lambda x: x[:, :P], rows), cache)
    parts = [part]
    for t in range(P, P + R):
        part, cache, _ = forward(model, params, jax.tree.map(lambda x, t=t: x[:, t : t + 1], rows), cache)
        parts.append(part)
    assert int(cache.index) == P + R
    np.testing.assert_allclose(jnp.concatenate(parts, 1)[real], full[real], rtol=0, atol=1e-6 * abs(full).max())


@pytest.mark.parametrize(
    "case",
    [
        None,
        "qwen3_windows",
        "olmo2_biases",
        "gemma2",
        "gemma3_by_type",
        "smollm3",
        "phi3_short",
        "granite_biases",
        "gpt_neox",
        "gpt2_untied",
    ],
)
def test_sharded_equals_single(case, x64):
    """Eight devices, every axis in use; two key heads over two tensor shards, and five query heads of one; float64."""
    from jaxalign.parallel.mesh import make_mesh
    from jaxalign.parallel.sharding import param_shardings, put_batch

    model = tiny.model(remat="full", tie_word_embeddings=False, **WIDE)
    model = model if case is None else Model(from_hf(CASES[case], remat="full", rope_length=100, **WIDE))
    params = params_of(model)
    rows = tiny.causal(np.random.default_rng(0).integers(0, 64, (8, 100)))
    weights = np.random.default_rng(1).normal(size=(8, 100))
    single = loss_and_grads(model, params, rows, weights)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        split = jax.device_put(params, param_shardings(mesh, params))
        sharded = jax.block_until_ready(loss_and_grads(model, split, put_batch(rows, mesh), put_batch(weights, mesh)))
    assert_close(single, sharded)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.2), ("float16", 0.03)])
def test_narrow_compute(dtype, tolerance):
    model, narrow = tiny.model(), tiny.model(dtype=dtype)
    params = params_of(model)
    rows = tiny.causal(np.random.default_rng(0).integers(0, 64, (2, 12)))
    hidden = forward(narrow, params, rows)[0]
    assert hidden.dtype == dtype
    difference = np.asarray(hidden, np.float32) - forward(model, params, rows)[0]
    assert np.sqrt(np.mean(difference**2)) < tolerance


def test_init_follows_the_abstract_tree():
    """Kernels normal(0, initializer_range), norms 1, biases 0, the scalar head's std 1 / sqrt(D + 1)."""
    changes = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "initializer_range": 0.5}
    model = tiny.model(**changes, hidden_size=256, param_dtype="bfloat16", head="score")
    params = jax.jit(model.init)(jax.random.key(0))
    assert "lm_head" not in params
    same = jax.tree.map(lambda a, p: (a.shape, a.dtype) == (p.shape, p.dtype), model.abstract(), params)
    assert all(jax.tree.leaves(same))
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, values = path[-1].key, np.asarray(leaf, np.float32)
        if path[0].key == "score":
            assert values.std() == pytest.approx(257**-0.5, rel=0.2)
        elif name in ("kernel", "embedding"):
            assert values.std() == pytest.approx(0.5, rel=0.08) and abs(values.mean()) < 0.05
        else:
            assert (values == (1 if name == "scale" else 0)).all()
    layers = np.asarray(params["layers"]["mlp"]["up"]["kernel"], np.float32)
    assert not np.array_equal(layers[0], layers[1])


def test_heads():
    plain, tied, score = tiny.model(tie_word_embeddings=False), tiny.model(), tiny.model(head="score")
    assert set(plain.abstract()) == {"embed", "layers", "norm", "lm_head"}
    assert set(tied.abstract()) == {"embed", "layers", "norm"}
    assert set(score.abstract()) == {"embed", "layers", "norm", "score"}
    params = params_of(tied)
    np.testing.assert_array_equal(tied.head(params), params["embed"]["embedding"].T)
    assert tiny.model(dtype="bfloat16").head(params).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="no token head"):
        score.head(params_of(score))
    with pytest.raises(ValueError, match="no scalar head"):
        tied.score_kernel(params)


@pytest.mark.parametrize("depth, traces", [(3, 3), (9, 1)])
def test_layers_are_traced_once(depth, traces, monkeypatch):
    """Few layers one after the other, more of them in a loop: one trace of each, or of one block whatever the depth,
    and none for a second step."""
    calls = []
    call = Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda *a, **k: calls.append(1) or call(*a, **k))
    model = tiny.model(num_hidden_layers=depth)
    params, rows = params_of(model), tiny.causal([[1, 2, 3]])
    for _ in range(3):
        forward(model, params, rows)
    assert len(calls) == traces
    assert hash(model) == hash(tiny.model(num_hidden_layers=depth)) and model == tiny.model(num_hidden_layers=depth)

"""Windows and ropes of layers: what rows promise, how layers run and which backend attends change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import WIDE, assert_close, forward, params_of

from jaxalign.data.promises import check_layout
from jaxalign.errors import InputError
from jaxalign.models import schedule
from jaxalign.models.cache import Cache
from jaxalign.models.identity import describe
from jaxalign.models.schedule import split_layers
from jaxalign.models.transformer import Model
from jaxalign.ops.rope import Rope
from jaxalign.train.flops import flops_per_token
from jaxalign.types import CausalByIndex, CausalByPosition, Rows
from tests.models import tiny_models as tiny

WINDOWS = {"one": (5, 5, 5), "some": (None, 5, 1), "all": (7, 3, 12)}
ROPES = {"some": (Rope(theta=50.0), Rope("linear", 9.0, 2.0), Rope(theta=50.0)), "all": (Rope(theta=9.0), None, None)}


def model_of(windows, attention=None, ropes=None, **changes) -> Model:
    return Model(dataclasses.replace(tiny.model(**WIDE | changes).config, windows=windows, ropes=ropes), attention)


@functools.partial(jax.jit, static_argnums=0)
def values(model, params, rows, sources, weights):
    """The hidden states of some tokens, and gradients of what weighs them."""

    def loss(params):
        hidden = model.apply(params, rows, sources=sources)[0]
        return jnp.sum(hidden * weights), hidden

    return jax.grad(loss, has_aux=True)(params)


def pair_of(prompt: int, chosen: int, rejected: int, causal=()) -> tuple[Rows, list[np.ndarray], list[np.ndarray]]:
    """A pair around its prompt, the two sequences, and where each one's tokens stand."""
    tokens = np.random.default_rng(0).integers(0, 64, prompt + chosen + rejected)
    at = np.arange(chosen, chosen + prompt)
    places = [np.concatenate([at, np.arange(chosen)[::-1]]), np.concatenate([at, at[-1] + 1 + np.arange(rejected)])]
    positions, index = np.zeros_like(tokens), np.arange(len(tokens))
    for place in places:
        positions[place] = np.arange(len(place))
    start = np.where(index < chosen, index, chosen)
    end = np.where(index < chosen, chosen + prompt, index + 1)
    rows = Rows(*(x[None].astype(np.int32) for x in (tokens, positions, start, end)), causal)
    check_layout(rows)
    return rows, [tokens[place] for place in places], places


@pytest.mark.parametrize(
    "windows, sizes, causal",
    [
        ("one", (20, 9, 12), ()),
        ("some", (20, 9, 12), ()),
        ("some", (60, 35, 45), ()),
        ("all", (60, 35, 45), CausalByPosition()),
    ],
)
def test_a_pair_around_its_prompt_equals_two_rows(windows, sizes, causal, x64):
    """Attention plain, short, and of rows sorted by position; some tokens are read; values and gradients."""
    rows, sequences, places = pair_of(*sizes, causal)
    model = model_of(WINDOWS[windows], ropes=ROPES.get(windows))
    params, rng = params_of(model), np.random.default_rng(1)
    read = [rng.choice(len(s), 10, replace=False) for s in sequences]
    weights = rng.normal(size=(2, 1, 10, 32))
    alone = [
        values(model, params, tiny.causal([s]), r[None], w) for s, r, w in zip(sequences, read, weights, strict=True)
    ]
    sources = np.concatenate([p[r] for p, r in zip(places, read, strict=True)])[None].astype(np.int32)
    grads, hidden = values(model, params, rows, sources, np.concatenate(list(weights), axis=1))
    assert_close(hidden, jnp.concatenate([x for _, x in alone], axis=1))
    assert_close(grads, jax.tree.map(jnp.add, *(g for g, _ in alone)))


@pytest.mark.parametrize(
    "windows, lengths", [("one", (11, 4, 17)), ("some", (60, 9, 61)), ("some", (400, 200)), ("all", (31, 50))]
)
def test_packed_rows_equal_each_alone(windows, lengths, x64):
    """With the promise, where windows move the starts, and without it; plain, short, causal and blocked; scanned with
    rematerialisation and one by one."""
    windows, ropes = WINDOWS[windows], ROPES.get(windows)
    T, rng = sum(lengths), np.random.default_rng(2)
    tokens = rng.integers(0, 64, (1, T))
    first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    positions = np.arange(T) - first
    rows = Rows(*(np.asarray(x, np.int32).reshape(1, T) for x in (tokens, positions, first, np.arange(1, T + 1))))
    check_layout(rows._replace(causal=CausalByIndex()))
    sources = np.arange(0, T, 7, dtype=np.int32)[None]
    weights = rng.normal(size=(1, sources.size, 32))
    found = []
    for remat, causal in (("none", CausalByIndex()), ("full", ())):
        model = model_of(windows, ropes=ropes, remat=remat)
        found.append(values(model, params_of(model), rows._replace(causal=causal), sources, weights))
    assert_close(*found)
    model = model_of(windows, ropes=ropes)
    for begin, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        inside = np.flatnonzero((sources[0] >= begin) & (sources[0] < begin + length))
        alone = forward(model, params_of(model), tiny.causal(tokens[:, begin : begin + length]))[0]
        assert_close(found[0][1][:, inside], alone[:, sources[0, inside] - begin])


@pytest.mark.parametrize("windows, arrays", [("one", 3), ("some", 3), ("some", 1), ("all", 3), ("all", 1)])
def test_decoding_equals_the_full_forward(windows, arrays, x64, monkeypatch):
    """Ragged prompts padded on the left, a prefill, then token by token; with a cache for each layer and a deep one."""
    monkeypatch.setattr(schedule, "_A_TURN", 1)
    model = model_of(WINDOWS[windows], ropes=ROPES.get(windows))
    params, c = params_of(model), model.config
    B, P, R, S = 3, 9, 12, 24
    tokens = np.random.default_rng(0).integers(3, 64, (B, P + R)).astype(np.int32)
    pad, slot = np.array([[0], [3], [8]]), np.arange(P + R)[None]
    real = slot >= pad
    fields = ((slot - pad, 0), (pad, slot), (slot + 1, slot + 1))
    rows = Rows(tokens, *(np.where(real, a, b).astype(np.int32) for a, b in fields))
    full = model.apply(params, rows)[0]
    np.testing.assert_allclose(model.prefill(params, rows)[0][real], full[real], rtol=0, atol=1e-9)
    shape = (*(() if arrays == 3 else (3,)), B, c.num_kv_heads, S, c.head_dim)
    cache = Cache(*(tuple(jnp.zeros(shape, c.dtype) for _ in range(arrays)) for _ in range(2)), jnp.int32(0))
    laid = params | {"layers": split_layers(params["layers"], arrays)}
    run = jax.jit(lambda rows, cache: model.apply(laid, rows, cache)[:2])
    parts = []
    for at in [slice(0, P), *(slice(t, t + 1) for t in range(P, P + R))]:
        part, cache = run(jax.tree.map(lambda x, at=at: x[:, at], rows), cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1)[real], full[real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ["splash", "triton"])
def test_kernels_without_windows_take_causal_rows(backend):
    """There a window is an interval; where it is none, a backend that was asked for says so."""
    rows = tiny.causal(np.random.default_rng(0).integers(0, 64, (1, 140)))._replace(causal=CausalByIndex())
    wide = {"dtype": "float32", "param_dtype": "float32", "head_dim": 16}
    model, plain = (model_of((None, 5, 5), name, **wide) for name in (backend, "plain"))
    params = params_of(model)
    run = lambda model: model.apply(params, rows)[0]  # noqa: E731
    assert np.linalg.norm(run(model) - run(plain)) <= 1e-5 * np.linalg.norm(run(plain))
    with pytest.raises(InputError, match="window"):
        model.apply(params, rows._replace(causal=()))


def test_windows_as_long_as_the_row_cost_nothing():
    """The program is that of a model without them."""
    rows = tiny.causal(np.zeros((2, 30), np.int32))

    def program(windows):
        model = model_of(windows, dtype="float32", param_dtype="float32")
        return jax.jit(jax.grad(lambda p: model.apply(p, rows)[0].sum())).lower(model.abstract()).as_text()

    assert program((30, 4096, None)) == program(None) != program((29, 4096, None))


def test_one_rope_for_every_layer_costs_nothing():
    rows, model = tiny.causal(np.zeros((2, 30), np.int32)), tiny.model()

    def program(ropes):
        other = Model(dataclasses.replace(model.config, ropes=ropes))
        return jax.jit(lambda p: other.prefill(p, rows)).lower(model.abstract()).as_text()

    assert program((model.config.rope,) * 3) == program(None) != program((model.config.rope, None, None))


def test_a_promise_of_positions_is_checked():
    rows = tiny.causal(np.zeros((1, 6), np.int32), pad_left=2, pad_right=1)._replace(causal=CausalByIndex())
    check_layout(rows)
    rows.positions.setflags(write=True)
    jumps = rows._replace(positions=rows.positions + (np.arange(9) > 4))
    with pytest.raises(ValueError, match="token 5 of row 0 sees tokens 2 to 5, whose positions"):
        check_layout(jumps)


def test_model_flops_count_the_keys_in_the_window():
    """A token of a causal row sees min(t + 1, W) keys; the formula is that of halves of tokens."""
    n, base = 1000, flops_per_token(model_of(None).config, 0.0)
    c = model_of(None).config
    for window in (1, 100, 1000, 5000):
        seen = sum(min(t + 0.5, window) for t in range(n)) / n
        found = flops_per_token(model_of((None, window, window)).config, n) - base
        assert found == pytest.approx(3 * 4 * c.num_heads * c.head_dim * (n / 2 + 2 * seen), rel=1e-3)


def test_model_flops_count_a_plain_mlps_two_matrices():
    c = model_of(None).config
    plain = dataclasses.replace(c, plain_mlp=True)
    less = flops_per_token(c, 0.0) - flops_per_token(plain, 0.0)
    assert less == 6 * c.num_layers * c.embed_dim * c.mlp_dim


def test_fields_that_came_later_leave_descriptions_as_they_were():
    """A reference cache of a model without them is still found."""
    assert describe(tiny.model().config) == "9079f088b897e17969568be7a833d392"
    others = ({}, {"windows": (4, 4, 4)}, {"windows": (4, 4, None)}, {"qk_norm": "head"}, {"output_bias": True})
    others += ({"norms": "after"}, {"norms": "both"}, {"qk_norm": "projection"}, {"norm_offset": 1.0})
    others += ({"activation": "gelu_tanh"}, {"embed_scale": 2.0}, {"attention_scale": 2.0})
    others += (
        {"residual_scale": 2.0},
        {"logit_scale": 2.0},
        {"norm": "layer"},
        {"parallel": True},
        {"plain_mlp": True},
    )
    others += ({"activation": "gelu"}, {"num_positions": 64})
    others += ({"attention_softcap": 2.0}, {"logit_softcap": 2.0}, {"ropes": ROPES["some"]}, {"ropes": ROPES["all"]})
    assert len({describe(dataclasses.replace(tiny.model().config, **more)) for more in others}) == len(others)

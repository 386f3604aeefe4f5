"""What a CPU does for speed in the layers: none of it may be seen in the result or its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.promises import check_layout
from jaxalign.data.rows import Layout, Shape, build_batch
from jaxalign.data.tokenize import Example
from jaxalign.models import position_order, schedule
from jaxalign.models.transformer import Model
from jaxalign.ops import attention_short
from jaxalign.ops.attention import attention
from jaxalign.ops.readout import read_hidden
from jaxalign.parallel.mesh import make_mesh
from jaxalign.types import CausalByPosition, Readouts, Rows
from tests.models import tiny_models as tiny
from tests.models.test_transformer import WIDE, assert_close, params_of

RNG = np.random.default_rng(0)


def pair_rows(length: int) -> Rows:
    """Two rows of a pair each, the second with padding."""
    sizes = (length // 4, length // 2, length - length // 4 - length // 2), (2, 3, 4)
    examples = [
        Example(i, RNG.integers(0, 64, p), tuple(RNG.integers(0, 64, n) for n in (c, r)), (), (True,) * 2, 1.0, 0.0)
        for i, (c, p, r) in enumerate(sizes)
    ]
    return untold(build_batch([[x] for x in examples], Shape(2, length, 0, 2), Layout("none"), 0).rows)


def readouts_of(source) -> Readouts:
    source = np.asarray(source, np.int32)
    return Readouts(source, source, 0 * source, np.ones(source.shape, bool))


def outcome(model, params, rows, source, weight):
    """What is read, and gradients of a number made from it."""

    def loss(params):
        hidden, readouts = read_hidden(model.apply, params, rows, readouts_of(source))
        assert readouts.source is None and hidden.shape[:2] == source.shape
        return jnp.sum(hidden * weight), hidden

    (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return hidden, gradients


def promised(rows: Rows) -> Rows:
    """They say that they are causal by position, and are taken in that order where that pays."""
    check_layout(rows._replace(causal=CausalByPosition()))
    return rows._replace(causal=CausalByPosition())


def untold(rows: Rows) -> Rows:
    return rows._replace(causal=())


@pytest.mark.parametrize("tell", [untold, promised])
@pytest.mark.parametrize("length, count", [(12, 3), (12, 12), (128, 1), (128, 96), (200, 200)])
def test_what_is_read_is_what_all_tokens_have(length, count, tell, x64):
    """Few sources or all, in any order and more than once, through short and long ways of attention."""
    model = tiny.model(**WIDE)
    params, rows = params_of(model), pair_rows(length)
    source = RNG.integers(0, length, (2, count))
    source[:, -1] = source[:, 0]
    weight = RNG.normal(size=(2, count, 32))

    def plain(params):
        hidden = model.apply(params, rows)[0]
        hidden = jnp.take_along_axis(hidden, source[:, :, None], axis=1)
        return jnp.sum(hidden * weight), hidden

    (_, hidden), gradients = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    assert_close((hidden, gradients), outcome(model, params, tell(rows), source, weight))


@pytest.mark.parametrize("changes", [{}, {"remat": "full"}, {"remat": "dots"}, {"most_weights": 1}])
def test_the_order_of_tokens_is_not_seen(changes, monkeypatch, x64):
    """Several pairs in a row, all hidden states and their gradients; weights that are too many take no other order."""
    monkeypatch.setattr(attention_short, "_MOST_WEIGHTS", changes.pop("most_weights", attention_short._MOST_WEIGHTS))
    model = tiny.model(**WIDE)
    rows = jax.tree.map(lambda x: x.reshape(1, -1), pair_rows(128))
    shift = np.repeat([0, 128], 128)[None]
    rows = rows._replace(attend_start=rows.attend_start + shift, attend_end=rows.attend_end + shift)
    params, weight = params_of(model), RNG.normal(size=(1, 256, 32))
    taken, sort_rows = [], position_order.sort_rows
    monkeypatch.setattr(position_order, "sort_rows", lambda rows: taken.append(rows) or sort_rows(rows))

    def run(model, rows):
        def loss(params):
            hidden = model.apply(params, rows)[0]
            return jnp.sum(hidden * weight), hidden

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    changed = Model(dataclasses.replace(model.config, **changes))
    assert_close(run(model, rows), run(changed, promised(rows)))
    assert len(taken) == (attention_short._MOST_WEIGHTS > 1)


def test_a_broken_promise_is_loud():
    """A token that sees a later position, which is left out, gets NaN, never a number that is wrong."""
    model, rows = tiny.model(num_hidden_layers=1), pair_rows(128)
    prompt = int(np.argmin(rows.positions[0]))
    end = rows.attend_end.copy()
    end[0, prompt] += 64
    broken = promised(rows)._replace(attend_end=end)
    with pytest.raises(ValueError, match=f"token {prompt} of row 0"):
        check_layout(broken)
    hidden = model.apply(params_of(model), broken)[0]
    bad = np.zeros((2, 128), bool)
    bad[0, prompt] = True
    np.testing.assert_array_equal(np.isnan(hidden).all(-1), bad)
    np.testing.assert_array_equal(np.isnan(hidden).any(-1), bad)


@pytest.mark.parametrize("count", [2, 12])
def test_layers_in_a_loop_are_layers_one_by_one(count, monkeypatch, x64):
    model = tiny.model(**WIDE, num_hidden_layers=3)
    params, rows = params_of(model), pair_rows(12)
    source, weight = RNG.integers(0, 12, (2, count)), RNG.normal(size=(2, count, 32))
    one_by_one = outcome(model, params, rows, source, weight)
    monkeypatch.setitem(schedule._UNROLLED, "cpu", 0)
    assert_close(one_by_one, outcome(model, params, rows, source, weight))


@pytest.mark.parametrize("count", [2, 12])
@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_a_gpu_has_layers_one_by_one_with_any_policy(remat, count, monkeypatch, x64):
    monkeypatch.setattr(schedule, "platform", lambda: "gpu")
    model = tiny.model(**WIDE, num_hidden_layers=3, remat=remat)
    params, rows = params_of(model), pair_rows(12)
    source, weight = RNG.integers(0, 12, (2, count)), RNG.normal(size=(2, count, 32))
    one_by_one = outcome(model, params, rows, source, weight)
    monkeypatch.setitem(schedule._UNROLLED, "gpu", 0)
    assert_close(one_by_one, outcome(model, params, rows, source, weight))


@pytest.mark.parametrize("length, tell", [(16, untold), (128, promised)])
def test_what_is_read_on_a_mesh(length, tell, x64):
    """Rows split over two axes, heads over the third."""
    model = tiny.model(**WIDE)
    params, rows = params_of(model), jax.tree.map(lambda x: np.concatenate([x, x]), pair_rows(length))
    source, weight = RNG.integers(0, length, (4, 4)), RNG.normal(size=(4, 4, 32))
    alone = outcome(model, params, rows, source, weight)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        assert_close(alone, outcome(model, params, tell(rows), source, weight))


def test_only_what_is_read_goes_through_the_last_layer():
    """The products of the last mlp are of the sources alone."""
    model, rows = tiny.model(), pair_rows(12)
    apply = lambda params: model.apply(params, rows, sources=np.zeros((2, 2), np.int32))[0]  # noqa: E731
    program = str(jax.make_jaxpr(apply)(model.abstract()))
    assert program.count("f32[2,2,48]") and program.count("f32[2,12,48]")
    mlp = [f"f32[2,{n},48] = dot_general" for n in (2, 12)]
    assert [program.count(product) for product in mlp] == [2, 2 * (model.config.num_layers - 1)]


def test_many_weights_are_not_kept(monkeypatch):
    """Rows too many for their attention's weights to be kept go block by block."""
    x = [jnp.asarray(RNG.normal(size=(2, 128, 2, 8)), jnp.float32) for _ in range(3)]
    _, _, start, end, _ = pair_rows(128)
    kept = attention(*x, start, end, backend="short")
    monkeypatch.setattr(attention_short, "_MOST_WEIGHTS", 2 * 2 * 128 * 128 - 1)
    program = str(jax.make_jaxpr(lambda *x: attention(*x, start, end, backend="short"))(*x))
    assert "128,128]" not in program.replace(" ", "")
    np.testing.assert_allclose(kept, attention(*x, start, end, backend="short"), atol=1e-5)

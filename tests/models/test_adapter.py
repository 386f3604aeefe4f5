"""Adapters: which linears they name, what fresh ones change (nothing), and the model that has them merged in."""

import dataclasses
import shlex

import jax
import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.models import adapter as adapters
from jaxalign.models.adapter import Rules
from jaxalign.models.transformer import Model
from jaxalign.ops.trees import by_path, from_paths
from jaxalign.rollout.layout import lay_out
from tests.models import tiny_models as tiny

ROWS = tiny.causal(np.random.default_rng(0).integers(3, 60, (2, 9)))
VARIED = Rules(
    4, 8.0, ("q_proj", r"layers\.1\.mlp\.down_proj"), ((r"layers\.1\.self_attn\.q_proj", 2), (r"2\..*\.q_proj", 6))
)
RULES = {"lora": Rules(4, 8.0), "dora": Rules(4, 8.0, dora=True), "varied": VARIED}


def adapted(rules, **changes):
    """A model with biases and its parameters, the adapter's moved away from their start."""
    base = tiny.model(attention_bias=True, **changes)
    model = Model(dataclasses.replace(base.config, adapter=adapters.make(base.config, rules)))
    start = model.init(jax.random.key(0))
    rng = np.random.default_rng(1)

    def moved(path, x):
        name = path[-1].key
        if name not in adapters.LEAVES:
            return x
        there = np.asarray(x) != 0 if name == "lora_a" else 1  # ranks stay what they are
        return x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) * there

    return model, start, jax.tree_util.tree_map_with_path(moved, start)


def hidden(model, params):
    return np.asarray(model.apply(params, ROWS)[0])


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_merged_equals_beside_and_a_tree_without_it_is_the_base(rules):
    model, start, params = adapted(rules)
    base = Model(dataclasses.replace(model.config, adapter=None))
    whole = hidden(model, params)
    assert np.abs(whole - hidden(model, adapters.base(params))).max() > 0.1
    one = params | {"layers": model.config.adapter.merged(params["layers"])}
    np.testing.assert_allclose(hidden(base, one), whole, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(hidden(model, adapters.base(params)), hidden(base, adapters.base(params)))
    if rules.dora:  # its norms are those of the kernels but for rounding
        np.testing.assert_allclose(hidden(model, start), hidden(base, adapters.base(start)), rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(hidden(model, start), hidden(base, adapters.base(start)))


@pytest.mark.parametrize("rules", [Rules(3, 7.0), VARIED._replace(alpha=7.0)], ids=["one_scale", "scales_by_layer"])
def test_in_float64_nothing_is_rounded_to_float32(rules, x64):
    wide = {"dtype": "float64", "param_dtype": "float64"}
    model, _, params = adapted(rules, **wide)
    layers = params["layers"]
    merged = by_path(model.config.adapter.merged(layers))
    laid = lay_out(model, params)["layers"]  # as PPO samples from
    for path, (ranks, scales) in model.config.adapter.updates:
        own = {name.rpartition("/")[2]: np.asarray(x) for name, x in by_path(layers).items() if name.startswith(path)}
        for layer in range(len(ranks)):
            a = own["lora_a"][layer].reshape(-1, max(ranks))
            product = (a @ own["lora_b"][layer].reshape(max(ranks), -1)).reshape(own["kernel"][layer].shape)
            wanted = own["kernel"][layer] + scales[layer] * product
            np.testing.assert_allclose(merged[f"{path}/kernel"][layer], wanted, rtol=0, atol=1e-14)
            np.testing.assert_allclose(by_path(laid[layer])[f"{path}/kernel"], wanted, rtol=0, atol=1e-14)
    base = Model(dataclasses.replace(model.config, adapter=None))
    whole = hidden(base, params | {"layers": from_paths(merged)})
    assert whole.dtype == np.float64
    np.testing.assert_allclose(hidden(model, params), whole, rtol=0, atol=1e-12)


def test_the_base_is_initialised_as_without_an_adapter():
    model, start, _ = adapted(VARIED)
    plain = Model(dataclasses.replace(model.config, adapter=None)).init(jax.random.key(0))
    assert jax.tree.structure(plain) == jax.tree.structure(adapters.base(start))
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(adapters.base(start)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_scanned_layers_and_layers_one_by_one_are_the_same():
    model, _, params = adapted(VARIED)
    scanned = Model(dataclasses.replace(model.config, remat="full"))
    np.testing.assert_allclose(hidden(scanned, params), hidden(model, params), rtol=0, atol=1e-5)


def test_ranks_and_scales_by_layer():
    model, start, _ = adapted(VARIED)
    of = dict(model.config.adapter.updates)
    assert set(of) == {"attention/query", "mlp/down"}
    assert of["attention/query"] == ((4, 2, 6), (2.0, 4.0, 8 / 6))
    assert of["mlp/down"].ranks == (0, 4, 0) and of["mlp/down"].scale == 2.0
    a = np.asarray(start["layers"]["attention"]["query"]["lora_a"])
    assert a.shape == (3, 32, 6)
    assert [np.count_nonzero(np.abs(one).sum(0)) for one in a] == [4, 2, 6]
    assert np.abs(a).max() <= 32**-0.5 and np.abs(a).max() > 0.9 * 32**-0.5


def test_numbers_beyond_a_layers_rank_have_no_gradient():
    model, start, params = adapted(VARIED)

    def loss(params):
        return (model.apply(params, ROWS)[0] ** 2).sum()

    for tree in (start, params):
        own = jax.grad(loss)(tree)["layers"]["attention"]["query"]
        beyond = np.asarray(tree["layers"]["attention"]["query"]["lora_a"]) == 0
        assert np.all(np.asarray(own["lora_a"])[beyond] == 0) or tree is params
    own["lora_b"] = np.asarray(own["lora_b"])
    assert np.all(own["lora_b"][1, 2:] == 0) and np.any(own["lora_b"][1, :2] != 0)


def test_a_layer_without_an_update_has_no_magnitudes_either():
    """Whatever stands there in the stacked arrays changes nothing, is not trained and is not merged."""
    model, start, params = adapted(Rules(4, 8.0, (r"layers\.[02].*q_proj",), dora=True))
    own = params["layers"]["attention"]["query"]
    kept = own["magnitude"].at[1].set(start["layers"]["attention"]["query"]["magnitude"][1])
    plain = params | {
        "layers": params["layers"] | {"attention": params["layers"]["attention"] | {"query": own | {"magnitude": kept}}}
    }
    np.testing.assert_array_equal(hidden(model, params), hidden(model, plain))
    gradient = jax.grad(lambda tree: (model.apply(tree, ROWS)[0] ** 2).sum())(params)
    found = np.abs(gradient["layers"]["attention"]["query"]["magnitude"]).max((1, 2))
    assert found[1] == 0 and found[0] > 0 and found[2] > 0
    merged = model.config.adapter.merged(params["layers"])["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(merged[1], own["kernel"][1])


def test_rank_stabilised_scale():
    config = tiny.model().config
    made = adapters.make(config, Rules(16, 8.0, ("v_proj",), rslora=True))
    assert made.updates == (("attention/value", ((16,) * 3, (2.0,) * 3)),)


@pytest.mark.parametrize(
    "rules, said, fix",
    [
        (Rules(4, 8.0, ("q_prj",)), "'q_prj' matches no linear", 'targets=["q_proj"]'),
        (Rules(4, 8.0, ("v_proj", "lm_head")), "'lm_head' matches no linear", '["v_proj", "'),
        (Rules(4, 8.0, rank_pattern=(("layers.9.*", 2),)), "'layers.9.*' matches no linear", "rank_pattern="),
        (Rules(4, 8.0, ("q_proj(",)), "missing \\), unterminated", "targets="),
        (
            Rules(4, 8.0, rank_pattern=(("v_proj", 2), ("q_prj", 3))),
            r"'q_prj' matches no linear of a layer \(adapter\.rank_pattern\)",
            'rank_pattern=[["v_proj", 2], ["q_proj", 3]]',
        ),
        (
            Rules(4, 8.0, alpha_pattern=(("layers.9.self_attn.o_proj", 2.0),)),
            r"\(adapter\.alpha_pattern\)",
            'alpha_pattern=[["model.layers.2.self_attn.o_proj", 2.0]]',
        ),
        (Rules(4, 8.0, alpha_pattern=(("o_proj[", 2.0),)), "unterminated", r'alpha_pattern=[["o_proj\\[", 2.0]]'),
    ],
)
def test_a_pattern_that_matches_nothing_gets_the_nearest_name(rules, said, fix):
    with pytest.raises(InputError, match=said) as caught:
        adapters.make(tiny.model().config, rules)
    (flag,) = shlex.split(caught.value.fix)
    assert flag.startswith("--config.adapter.") and fix in flag
    assert "q_proj" in caught.value.expected or "regular expression" in caught.value.expected

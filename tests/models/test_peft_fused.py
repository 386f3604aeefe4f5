"""Adapters of fused kernels: what an export put together is taken apart again, so that ranks do not grow."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.models import adapter as adapters
from jaxalign.models import hf, peft
from jaxalign.models.adapter import Rules
from jaxalign.models.transformer import Model
from jaxalign.ops.trees import by_path
from jaxalign.train.starts import start_of
from tests.models import tiny_models as tiny
from tests.models.test_peft import exported, hidden, read
from tests.models.tiny_families import CASES

ADAPTERS = {
    "phi3": ("phi3", Rules(4, 8.0)),
    "gpt2": ("gpt2", Rules(4, 8.0)),
    "gpt_neox": ("gpt_neox", Rules(4, 8.0)),
    "dora": ("phi3", Rules(4, 8.0, dora=True)),
    "rslora": ("phi3", Rules(4, 7.0, rslora=True)),
    "some_parts_and_ranks": (
        "phi3",
        Rules(4, 8.0, ("layers/attention/query", "attention/value"), (("value", 2),), (("value", 4.0),)),
    ),
    "some_layers": ("gpt_neox", Rules(4, 8.0, (r"layers\.[02].*query_key_value", "layers/attention/key"))),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_was_written_of_each_part_is_read_of_each_part(tmp_path, case):
    family, rules = ADAPTERS[case]
    model, _, own = exported(tmp_path, rules, CASES[family])
    saved = read(tmp_path / "adapter")
    assert [path for path, _ in saved.adapter.updates] == [path for path, _ in model.config.adapter.updates]
    for (_, found), (_, wanted) in zip(saved.adapter.updates, model.config.adapter.updates, strict=True):
        assert found.ranks == wanted.ranks
        np.testing.assert_allclose(found.scales, wanted.scales, rtol=1e-15)
    wanted = by_path(own)
    for path, array in by_path(saved.leaves).items():
        ranks = next(update.ranks for p, update in saved.adapter.updates if f"layers/{p}/" in path)
        for layer, rank in enumerate(ranks):
            upto = {"a": (..., slice(rank)), "b": slice(rank)}.get(path[-1], slice(None) if rank else slice(0))
            np.testing.assert_array_equal(array[layer][upto], wanted[path][layer][upto], err_msg=path)

    hf.save(tmp_path / "again", model, saved.leaves, base=str(tmp_path / "base"))
    for name in ("adapter_config.json", peft.WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize("case", ["phi3", "rslora", "some_parts_and_ranks"])
def test_the_same_rules_go_on_from_it(tmp_path, case):
    family, rules = ADAPTERS[case]
    exported(tmp_path, rules, CASES[family])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    usual = {"key": jax.random.key(0), "scratch": False, "new_head": False, "attention": None}
    found = start_of(str(tmp_path / "adapter"), None, mesh, rules=rules, **usual, **tiny.SETTINGS, head="lm")
    wanted = adapters.make(found.model.config, rules)
    assert [(path, u.ranks) for path, u in found.model.config.adapter.updates] == [
        (path, u.ranks) for path, u in wanted.updates
    ]


@pytest.mark.parametrize("case", ["phi3", "gpt2", "gpt_neox", "dora", "rslora"])
def test_the_same_rules_go_on_from_an_adapter_that_was_not_trained(tmp_path, case):
    family, rules = ADAPTERS[case]
    _, params, wanted = untrained(tmp_path, rules, CASES[family])
    saved = read(tmp_path / "adapter")
    assert saved.adapter == wanted.config.adapter
    assert not any(np.any(x) for path, x in by_path(saved.leaves).items() if path.endswith("lora_b"))
    assert {update.ranks for _, update in saved.adapter.updates} == {(4,) * wanted.config.num_layers}
    found = hidden(*hf.load(tmp_path / "adapter", **tiny.SETTINGS))
    np.testing.assert_allclose(found, hidden(wanted, params), rtol=0, atol=2e-5)
    hf.save(tmp_path / "again", wanted, saved.leaves, base=str(tmp_path / "base"))
    assert (tmp_path / "again" / peft.WEIGHTS).read_bytes() == (tmp_path / "adapter" / peft.WEIGHTS).read_bytes()


def untrained(directory, rules, config):
    """A base, and an adapter of it as training starts from."""
    tiny.write(directory / "base", config, tiny.tensors(config))
    base, params = hf.load(directory / "base", **tiny.SETTINGS)
    model = Model(dataclasses.replace(base.config, adapter=adapters.make(base.config, rules)))
    own = model.init_adapter(jax.random.key(0), params["layers"])
    hf.save(directory / "adapter", model, own, base=str(directory / "base"))
    return base, params, model


@pytest.mark.parametrize("family, module", [("phi3", "qkv_proj"), ("gpt2", "c_attn"), ("gpt_neox", "query_key_value")])
def test_alphas_that_differ_are_in_b_rounded_once(tmp_path, family, module):
    names = tuple(f"attention/{part}" for part in ("query", "key", "value"))
    rules = Rules(3, 3.0, names, alpha_pattern=((names[1], 7.0), (names[2], 0.1)))
    model, _, own = exported(tmp_path, rules, CASES[family])
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["lora_alpha"] / told["r"] == 1.0 and not told["alpha_pattern"]
    saved = read(tmp_path / "adapter")
    for name, alpha in zip(names, (3.0, 7.0, 0.1), strict=True):
        mine, found = (by_path(tree["layers"]) for tree in (own, saved.leaves))
        assert model.config.adapter.update(name).scale == pytest.approx(alpha / 3)
        assert saved.adapter.update(name) == ((3,) * model.config.num_layers, (1.0,) * model.config.num_layers)
        np.testing.assert_array_equal(found[f"{name}/lora_a"], mine[f"{name}/lora_a"])
        exact = np.asarray(mine[f"{name}/lora_b"], np.float64) * (alpha / 3)
        np.testing.assert_array_equal(found[f"{name}/lora_b"], exact.astype(np.float32))
    assert any(module in name for name in load_file(tmp_path / "adapter" / peft.WEIGHTS))


def changed(directory, how):
    tensors = {name: how(name, x) for name, x in load_file(directory / peft.WEIGHTS).items()}
    save_file(tensors, directory / peft.WEIGHTS)


def shared_a(directory):
    """An adapter of Phi-3's qkv_proj with one A for its parts, as PEFT makes it, its B zeros."""
    config, rules = CASES["phi3"], Rules(4, 8.0, ("attention/query", "attention/key", "attention/value"))
    tiny.write(directory / "base", config, tiny.tensors(config))
    base, params = hf.load(directory / "base", **tiny.SETTINGS)
    model = Model(dataclasses.replace(base.config, adapter=adapters.make(base.config, rules)))
    own = model.init_adapter(jax.random.key(0), params["layers"])
    parts = own["layers"]["attention"]
    for part in parts.values():
        part["lora_a"] = parts["query"]["lora_a"]
    hf.save(directory / "adapter", model, own, base=str(directory / "base"))
    assert json.loads((directory / "adapter" / "adapter_config.json").read_text())["r"] == 4
    return model


@pytest.mark.parametrize(
    "parts",  # which of them each column of B is of: query 0, key 1, value 2
    [((), (), (), ()), ((0, 1, 2),) * 4, ((0,), (0, 1), (1,), (2,)), ((2,), (1,), (0,), (0,))],
    ids=["fresh", "trained", "one_in_two", "in_another_order"],
)
def test_what_peft_trained_keeps_its_one_a(tmp_path, parts):
    model = shared_a(tmp_path)
    sizes = [model.config.num_heads * model.config.head_dim, *2 * [model.config.num_kv_heads * model.config.head_dim]]
    b = np.repeat([[float(part in own) for own in parts] for part in range(3)], sizes, axis=0).astype(np.float32)
    changed(tmp_path / "adapter", lambda name, x: b if "lora_B" in name else x)
    saved = read(tmp_path / "adapter")
    a = [saved.leaves["layers"]["attention"][part]["lora_a"] for part in ("query", "key", "value")]
    assert [update.ranks for _, update in saved.adapter.updates] == [(4,) * 3] * 3
    np.testing.assert_array_equal(a[0], a[1])
    np.testing.assert_array_equal(a[0], a[2])


def test_a_part_without_columns_keeps_its_magnitudes(tmp_path):
    """With DoRA a part whose B is zero still has norms that were trained."""
    model, _, _ = exported(tmp_path, Rules(4, 8.0, ("qkv_proj",), dora=True), CASES["phi3"])
    rows = model.config.num_heads * model.config.head_dim
    changed(tmp_path / "adapter", lambda name, x: np.concatenate([0 * x[:rows], x[rows:]]) if "lora_B" in name else x)
    saved = read(tmp_path / "adapter")
    assert [path for path, _ in saved.adapter.updates] == [f"attention/{part}" for part in ("query", "key", "value")]
    assert {update.ranks for _, update in saved.adapter.updates} == {(12,) * 3}


def test_columns_of_zeros_are_kept(tmp_path):
    """One that was never trained goes to the part before it: what the adapter adds is the same."""
    model, params, _ = exported(tmp_path, Rules(4, 8.0, ("qkv_proj",)), CASES["phi3"])
    changed(tmp_path / "adapter", lambda name, x: x * (np.arange(12) != 4) if "lora_B" in name else x)
    saved = read(tmp_path / "adapter")
    assert [update.rank for _, update in saved.adapter.updates] == [5, 3, 4]
    merged = hf.load(tmp_path / "adapter", **tiny.SETTINGS)
    key = params["layers"]["attention"]["key"]
    key["lora_b"] = key["lora_b"].at[:, 0].set(0)
    np.testing.assert_allclose(hidden(*merged), hidden(model, params), rtol=0, atol=2e-5)

"""Adapters in PEFT's form: written and read back bitwise, merged as they are computed, and bad ones told by name."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jaxalign.errors import InputError
from jaxalign.models import adapter as adapters
from jaxalign.models import hf, peft
from jaxalign.models.adapter import Rules, is_adapter
from jaxalign.models.config import read_config, read_hf
from jaxalign.models.hf_names import Fused, Row
from jaxalign.models.hub import base_of, locate
from jaxalign.models.identity import identify
from jaxalign.models.tokenizer import load_tokenizer, stop_ids
from jaxalign.models.transformer import Model
from jaxalign.ops.trees import by_path, join, split
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES

ROWS = tiny.causal(np.random.default_rng(0).integers(3, 60, (2, 7)))
LORA = Rules(4, 8.0, ("q_proj", "down_proj"))
VARIED = Rules(4, 8.0, ("q_proj", r"layers\.1\..*o_proj"), (("layers.1.*q_proj", 6),), (("o_proj", 3.0),), rslora=True)


def moved(model, params, trains=is_adapter):
    rng = np.random.default_rng(1)

    def one(path, x):
        name = "/".join(k.key for k in path)
        there = np.asarray(x) != 0 if name.endswith("lora_a") else 1  # ranks stay what they are
        return x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) * there if trains(name) else x

    params = join(params, model.init_adapter(jax.random.key(0), params["layers"]))
    params = jax.tree_util.tree_map_with_path(one, params)
    return params, split(params, trains)[0]


def exported(directory, rules=LORA, config=None, whole=(), **settings):
    """A base, an adapter of it, its model, parameters and those that were trained."""
    config = config or tiny.hf_config()
    tiny.write(directory / "base", config, tiny.tensors(config))
    base, params = hf.load(directory / "base", **tiny.SETTINGS, **settings)
    model = Model(dataclasses.replace(base.config, adapter=adapters.make(base.config, rules)))
    params, own = moved(model, params, lambda name: is_adapter(name) or name.startswith(("score/", *whole)))
    hf.save(directory / "adapter", model, own, base=str(directory / "base"))
    return model, params, own


def read(directory):
    return peft.read(directory, read_config(directory, **tiny.SETTINGS))


def hidden(model, params):
    return np.asarray(model.apply(params, ROWS)[0])


def test_in_float64_it_is_merged_in_float64(tmp_path, x64):
    exported(tmp_path, VARIED)
    wide = tiny.SETTINGS | {"dtype": "float64", "param_dtype": "float64"}
    found, base = (by_path(hf.load(tmp_path / name, **wide)[1]) for name in ("adapter", "base"))
    saved = read(tmp_path / "adapter")
    leaves = by_path(saved.leaves)
    for path, (ranks, scales) in saved.adapter.updates:
        kernel = np.asarray(base[f"layers/{path}/kernel"])
        a, b = (leaves[f"layers/{path}/{name}"].astype(np.float64) for name in ("lora_a", "lora_b"))
        for layer in range(len(ranks)):
            product = a[layer].reshape(-1, max(ranks)) @ b[layer].reshape(max(ranks), -1)
            wanted = kernel[layer] + scales[layer] * product.reshape(kernel[layer].shape)
            np.testing.assert_allclose(found[f"layers/{path}/kernel"][layer], wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "rules, config",
    [
        (LORA, None),
        (VARIED, None),
        (Rules(4, 8.0, (r"layers\.[02].*(q|down)_proj",), dora=True), None),
        (Rules(4, 8.0), CASES["phi3"]),
    ],
    ids=["lora", "varied", "dora_some_layers", "fused"],
)
def test_what_is_written_is_read_and_written_again(tmp_path, rules, config):
    model, params, own = exported(tmp_path, rules, config)
    saved = read(tmp_path / "adapter")
    assert not saved.tensors
    config = dataclasses.replace(model.config, adapter=saved.adapter)
    if model.config.family.name == "Llama":
        assert saved.adapter == model.config.adapter or np.allclose(
            [u.scales for _, u in saved.adapter.updates], [u.scales for _, u in model.config.adapter.updates], 1e-15
        )
        for path, array in by_path(saved.leaves).items():
            layers = next(u.ranks for p, u in saved.adapter.updates if p in path)
            for layer, rank in enumerate(layers):
                upto = {"a": (..., slice(rank)), "b": slice(rank)}.get(path[-1], slice(None) if rank else slice(0))
                np.testing.assert_array_equal(array[layer][upto], by_path(own)[path][layer][upto])
    hf.save(tmp_path / "again", Model(config), saved.leaves, base=str(tmp_path / "base"))
    for name in ("adapter_config.json", peft.WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    merged, whole = hf.load(tmp_path / "adapter", **tiny.SETTINGS)
    assert merged.config.adapter is None
    np.testing.assert_allclose(hidden(merged, whole), hidden(model, params), rtol=0, atol=2e-5)
    hf.save(tmp_path / "merged", model, params, source=tmp_path / "base")
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(hf.load(tmp_path / "merged", **tiny.SETTINGS)[1])):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_the_description_is_peft_s(tmp_path):
    exported(tmp_path, VARIED)
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["peft_type"] == "LORA" and told["task_type"] == "CAUSAL_LM" and told["use_rslora"]
    assert told["base_model_name_or_path"] == str(tmp_path / "base")
    assert (told["r"], told["lora_alpha"]) == (4, 8)
    assert told["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 6} and told["alpha_pattern"] == {"o_proj": 3}
    assert told["target_modules"] == ["q_proj", "model.layers.1.self_attn.o_proj"]
    shapes = {k: v.shape for k, v in load_file(tmp_path / "adapter" / peft.WEIGHTS).items()}
    at = "base_model.model.model.layers.1.self_attn."
    assert shapes[at + "q_proj.lora_A.weight"] == (6, 32) and shapes[at + "q_proj.lora_B.weight"] == (32, 6)
    assert len(shapes) == 2 * 4


_FORMS = {
    "linear": [Row("o.weight", "out", "D(NH) -> NHD")],
    "side by side": [Row("q.weight", path, f"({n}H)D -> D{n}H") for path, n in zip("qkv", "NKK", strict=True)],
    "by head": [Row("q.weight", path, "NHD -> DNH", along=1, merged=2) for path in "qkv"],
    "conv1d": [Row("c.weight", "up", "DF -> DF")],
    "conv1d side by side": [Row("c.weight", path, "D(NH) -> DNH", along=1) for path in "qkv"],
}


@pytest.mark.parametrize("rows", _FORMS.values(), ids=_FORMS)
def test_a_kernel_s_parts_get_their_parts_of_its_update(rows):
    """What PEFT adds to the stored weight is, part by part, what ours add to the kernels."""
    dims, rng = {"D": 5, "F": 7, "N": 4, "K": 2, "H": 3, "R": 2}, np.random.default_rng(0)
    fused, lies = Fused(tuple(rows)), [peft.Lies.of(row) for row in rows]
    b_form = Fused(tuple(lie.lora_b for lie in lies))
    a, b = rng.normal(size=lies[0].lora_a.shape(dims)), rng.normal(size=b_form.shape(dims))
    added = b @ a
    added = added if added.shape == fused.shape(dims) else added.T
    assert a.shape[0] == b.shape[1] == 2 and added.shape == fused.shape(dims)
    blocks = []
    for row, lie in zip(rows, lies, strict=True):
        own_a = lie.lora_a.to_ours(a, dims)
        own_b = lie.lora_b.to_ours(b_form.part(lie.lora_b, b, dims), dims)
        wanted = row.to_ours(fused.part(row, added, dims), dims)
        np.testing.assert_allclose(np.tensordot(own_a, own_b, 1), wanted, rtol=1e-12)
        blocks.append(lie.lora_b.to_theirs(own_b, dims))
    np.testing.assert_array_equal(b_form.whole(blocks, dims), b)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("file", [np.float32, "bfloat16"])
def test_the_sum_is_rounded_once(tmp_path, param_dtype, file):
    """The base's own bits where it has no update; else the float32 sum, rounded to the wanted dtype."""
    _, params, _ = exported(tmp_path)
    if file == "bfloat16":
        tensors = load_file(tmp_path / "base" / "model.safetensors")
        tiny.write(tmp_path / "base", tiny.hf_config(), tensors, dtype=jax.numpy.bfloat16)
    settings = tiny.SETTINGS | {"param_dtype": param_dtype}
    base = by_path(hf.load(tmp_path / "base", **tiny.SETTINGS)[1])
    own = by_path(params)
    for path, array in by_path(hf.load(tmp_path / "adapter", **settings)[1]).items():
        assert array.dtype == param_dtype
        at = path.removesuffix("kernel")
        wanted = np.asarray(base[path])
        if f"{at}lora_a" in own:
            a, b = (np.asarray(own[f"{at}{name}"]) for name in ("lora_a", "lora_b"))
            flat = a.reshape(3, -1, 4) @ (b.reshape(3, 4, -1) * np.float32(2))
            wanted = wanted + flat.reshape(wanted.shape)
            off = np.abs(np.asarray(array, np.float32) - wanted)
            assert np.all(off <= (2e-6 if param_dtype == "float32" else np.abs(wanted) / 256 + 1e-6))
        else:
            np.testing.assert_array_equal(np.asarray(array), wanted.astype(param_dtype))


def test_each_device_gets_its_part(tmp_path):
    exported(tmp_path)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    shardings = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: NamedSharding(mesh, P(None, "x") if x.ndim > 1 else P()), tree
    )
    sharded = hf.load(tmp_path / "adapter", **tiny.SETTINGS, shardings=shardings)[1]
    whole = hf.load(tmp_path / "adapter", **tiny.SETTINGS)[1]
    for one, other in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    assert len(sharded["layers"]["mlp"]["down"]["kernel"].sharding.device_set) == 2


def test_the_score_head_and_what_was_trained_whole(tmp_path):
    whole = ("embed/", "norm/")
    _, params, _ = exported(tmp_path, whole=whole, head="score", key=jax.random.key(2))
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["task_type"] == "SEQ_CLS"
    assert told["modules_to_save"] == ["embed_tokens", "model.norm", "score"]
    assert read_hf(tmp_path / "adapter")["architectures"] == ["LlamaForSequenceClassification"]
    merged, again = hf.load(tmp_path / "adapter", **tiny.SETTINGS)
    assert merged.config.head == "score"
    for path in ("embed/embedding", "norm/scale", "score/kernel"):
        np.testing.assert_array_equal(by_path(again)[path], by_path(params)[path])
    hf.check(tmp_path / "adapter", merged.config)
    hf.check_numbers(tmp_path / "adapter", dtype="float32", head="score")


def test_a_value_model_may_start_from_an_adapter(tmp_path):
    exported(tmp_path)
    value, again = hf.load(tmp_path / "adapter", **tiny.SETTINGS, head="score", key=jax.random.key(0))
    assert value.config.head == "score" and again["score"]["kernel"].shape == (32, 1)


def test_files_beside_it(tmp_path, shared):
    """The tokenizer of the adapter where it has one, else its base's; what ends a text is the base's."""
    exported(tmp_path)
    tokens = shared / "models" / "stories260k-llama"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokens / name, tmp_path / "base" / name)
    tokenizer = load_tokenizer(tmp_path / "adapter")
    assert tokenizer.encode("Once") == load_tokenizer(tokens).encode("Once")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert {2, 9} <= set(stop_ids(tmp_path / "adapter", tokenizer))
    assert stop_ids(tmp_path / "adapter", tokenizer) == stop_ids(tmp_path / "base", tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert "<new>" in load_tokenizer(tmp_path / "adapter").get_vocab()


def test_an_export_beside_another(tmp_path):
    model, params, own = exported(tmp_path)
    hf.save(tmp_path / "adapter", model, own, base=str(tmp_path / "base"))  # an earlier export
    hf.save(tmp_path / "adapter", model, params, source=tmp_path / "base")  # whole in its place
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    hf.save(tmp_path / "adapter", model, own, base=str(tmp_path / "base"))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", peft.WEIGHTS]
    (tmp_path / "adapter" / "mine.txt").touch()
    with pytest.raises(InputError, match=r"holds mine\.txt"):
        hf.save(tmp_path / "adapter", model, own, base=str(tmp_path / "base"))


def test_a_base_is_named_from_where_the_command_runs(tmp_path, monkeypatch):
    exported(tmp_path)
    edit(tmp_path / "adapter", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    assert base_of(locate(tmp_path / "adapter")) == tmp_path / "base"
    shutil.copytree(tmp_path / "adapter", tmp_path / "moved" / "adapter")
    monkeypatch.chdir(tmp_path / "moved")
    with pytest.raises(InputError, match="is an adapter of base") as caught:
        base_of(tmp_path / "moved" / "adapter")
    assert '"base_model_name_or_path": "DIR" in' in caught.value.fix
    edit(tmp_path / "moved" / "adapter", base_model_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="which is an adapter itself"):
        base_of(tmp_path / "moved" / "adapter")


def test_its_identity_is_its_base_s_too(tmp_path):
    exported(tmp_path)
    found = [identify(tmp_path / "adapter")]
    edit(tmp_path / "adapter", lora_alpha=9)
    found.append(identify(tmp_path / "adapter"))
    change(tmp_path / "adapter", lambda name, x: x + 1 if "layers.1" in name else x)
    found.append(identify(tmp_path / "adapter"))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tiny.write(tmp_path / "base", tiny.hf_config(), {k: v * 2 for k, v in tensors.items()})
    found.append(identify(tmp_path / "adapter"))
    assert len(set(found)) == 4
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "elsewhere"))
    assert identify(tmp_path / "adapter") == found[-1]


def edit(directory, **fields):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change(directory, how, rename=lambda name: name):
    """Other tensors in the file; None leaves one out."""
    tensors = {rename(name): how(name, x) for name, x in load_file(directory / peft.WEIGHTS).items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / peft.WEIGHTS)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"task_type": "TOKEN_CLS"}, "task_type 'TOKEN_CLS'"),
        ({"trainable_token_indices": [1, 2]}, r"no base_model\.model\.model\.embed_tokens\.token_adapter"),
        ({"trainable_token_indices": [1, 64]}, r"trainable_token_indices \[1, 64\]"),
        ({"trainable_token_indices": [2, 1, 2]}, r"trainable_token_indices \[2, 1, 2\]"),
        ({"trainable_token_indices": {"wte": [1]}}, "trainable_token_indices of 'wte'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"a_field_of_tomorrow": {"x": 1}}, "a_field_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"r": 0}, "r 0 in"),
        ({"lora_alpha": "8"}, "lora_alpha '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"lora_alpha": float("-inf")}, "lora_alpha -inf"),
        ({"lora_alpha": 1e308}, r"lora_alpha 1e\+308"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\['q_proj'\] nan"),
        ({"use_rslora": "false"}, "use_rslora 'false'"),
        ({"use_dora": 0}, "use_dora 0"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, r"rank_pattern '\(\?i\)q_proj' in .*global flags"),
        ({"modules_to_save": ["("]}, r"modules_to_save '\('"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern\['q_proj'\] 2.5"),
        ({"rank_pattern": {"q_proj(": 2}}, r"rank_pattern 'q_proj\('"),
        ({"target_modules": 3}, "target_modules 3"),
        ({"target_modules": None}, "target_modules None"),
        ({"r": 8}, r"q_proj\.lora_A\.weight of shape \(4, 32\)"),
        ({"use_dora": True}, r"no base_model.*q_proj\.lora_magnitude_vector"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, r"no base_model.*0\.self_attn\.v_proj\.lora_A"),
        ({"target_modules": ["q_proj"]}, r"mlp\.down_proj\.lora_A\.weight in"),
        ({"modules_to_save": ["lm_head"]}, r"no base_model\.model\.\.\.\.lm_head"),
        ({"task_type": "SEQ_CLS"}, r"no base_model\.model\.score\.weight"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path None"),
    ],
)
def test_a_description_that_is_not_honoured(tmp_path, adapter, fields, said):
    edit(adapter, **fields)
    with pytest.raises(InputError, match=said) as caught:
        read(adapter)
    assert str(adapter) in caught.value.found and caught.value.fix


_Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "how, rename, said",
    [
        (lambda n, x: None if n == f"{_Q1}.lora_B.weight" else x, None, rf"no {_Q1}\.lora_B\.weight"),
        (
            lambda n, x: x[:, :-1].copy() if n == f"{_Q1}.lora_A.weight" else x,
            None,
            r"lora_A\.weight of shape \(4, 31\)",
        ),
        (lambda n, x: x * np.nan if n == f"{_Q1}.lora_B.weight" else x, None, "NaN"),
        (lambda n, x: x.astype(np.int32), None, "of type I32"),
        (None, lambda n: n.replace("layers.2", "layers.7"), r"layers\.7\.\S+lora_A\.weight in .*of a 3-layer Llama"),
        (None, lambda n: n.replace("q_proj", "query_key_value"), "query_key_value"),
        (None, lambda n: n.removeprefix("base_model.model."), "keys that begin with base_model"),
        (None, lambda n: n.replace("layers.1.self_attn.q_proj.lora_A", "embed_tokens.lora_embedding_A"), "embedding_A"),
        (None, lambda n: n.replace("model.layers.1.self_attn.q_proj", "lm_head"), "lm_head.lora_A"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, adapter, how, rename, said):
    change(adapter, how or (lambda name, x: x), rename or (lambda name: name))
    with pytest.raises(InputError) as caught:
        read(adapter)
    assert re.search(said, f"{caught.value.found} {caught.value.expected}"), str(caught.value)
    assert str(adapter) in caught.value.found


@pytest.mark.parametrize(
    "name, shape, said",
    [
        ("model.embed_tokens.weight", (70, 32), r"of shape \(70, 32\)"),
        ("model.embed_tokens.weight", (64, 32), r"embed_tokens\.weight without base_model\.model\.lm_head"),
        ("model.layers.9.input_layernorm.weight", (32,), r"layers\.9"),
        ("vision.weight", (2,), r"vision\.weight"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", (2, 32), "token_adapter"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", (32,), "magnitude"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight.weight", (4, 32), r"lora_A\.weight\.weight in"),
    ],
)
def test_tensors_beside_the_updates_that_do_not_fit(tmp_path, adapter, name, shape, said):
    tensors = load_file(adapter / peft.WEIGHTS) | {f"base_model.model.{name}": np.ones(shape, np.float32)}
    save_file(tensors, adapter / peft.WEIGHTS)
    with pytest.raises(InputError, match=said):
        read(adapter)


@pytest.mark.parametrize(
    "names",
    [
        [f"self_attn.q_proj.lora_magnitude_vector{end}" for end in ("", ".weight")],
        [f"self_attn.k_proj{own}.weight" for own in ("", ".base_layer")],
    ],
)
def test_a_tensor_under_two_keys(adapter, names):
    edit(adapter, use_dora="magnitude" in names[0])
    added = {f"base_model.model.model.layers.0.{name}": np.ones(32, np.float32) for name in names}
    save_file(load_file(adapter / peft.WEIGHTS) | added, adapter / peft.WEIGHTS)
    with pytest.raises(InputError, match="the same under another key"):
        read(adapter)


def test_an_adapter_of_a_larger_base(tmp_path, adapter):
    config = tiny.hf_config(hidden_size=40)
    tiny.write(adapter.parent / "base", config, tiny.tensors(config))
    with pytest.raises(InputError, match=r"lora_A\.weight of shape \(4, 32\)") as caught:
        read(adapter)
    assert "(4, 40)" in caught.value.expected and "base_model_name_or_path" in caught.value.fix


def test_no_weights_or_old_ones(tmp_path, adapter):
    (adapter / peft.WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin in") as caught:
        read(adapter)
    assert "save_pretrained" in caught.value.fix


def test_trained_parameters_for_which_peft_has_no_form(tmp_path):
    model, params, _ = exported(tmp_path, config=tiny.hf_config(attention_bias=True))
    cases = {
        "is trained whole": ("layers/attention/query/",),  # bias and kernel, beside an update
        "layers/attention/key/bias is not": ("layers/attention/key/kernel",),
    }
    for said, whole in cases.items():
        some = split(params, lambda name, whole=whole: is_adapter(name) or name.startswith(whole))[0]
        with pytest.raises(InputError, match=said):
            hf.save(tmp_path / "out", model, some, base="base")
    with pytest.raises(InputError, match="no adapter among"):
        hf.save(tmp_path / "out", model, {"norm": params["norm"]}, base="base")
    with pytest.raises(InputError, match="embed_out is trained whole, which versions"):
        exported(tmp_path / "neox", Rules(4, 8.0, ("dense",)), CASES["gpt_neox"], ("lm_head/",))
    with pytest.raises(InputError, match=r"some parts of model\.layers\.0\.self_attn\.qkv_proj have"):
        exported(tmp_path / "phi", Rules(4, 8.0, ("attention/query",), dora=True), CASES["phi3"])


@pytest.fixture(scope="module")
def an_adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("peft")
    exported(directory)
    return directory


@pytest.fixture
def adapter(an_adapter, tmp_path):
    """An adapter and its base, to be spoilt."""
    shutil.copytree(an_adapter, tmp_path / "spoilt")
    edit(tmp_path / "spoilt" / "adapter", base_model_name_or_path=str(tmp_path / "spoilt" / "base"))
    return tmp_path / "spoilt" / "adapter"

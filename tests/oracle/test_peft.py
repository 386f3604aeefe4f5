"""Adapters against PEFT's own classes on torch, both ways: read from its files, written for it, merged, trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file

from jaxalign.models import adapter as adapters
from jaxalign.models import hf
from jaxalign.models import peft as saved_adapters
from jaxalign.models.adapter import Rules, is_adapter
from jaxalign.models.config import read_config
from jaxalign.models.token_rows import EMBEDDING, HEAD, TokenRows, table_of
from jaxalign.models.transformer import Model
from jaxalign.ops.logits import logits
from jaxalign.ops.trees import join, split
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES
from tests.oracle.test_models_llama import torch_model

IDS = np.random.default_rng(0).integers(3, 60, (2, 9))
PATTERNS = {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"o_proj": 3.0}}
BIASED = tiny.hf_config(tie_word_embeddings=False, attention_bias=True)
# The base's config.json, and what PEFT is asked for.
ADAPTERS = {
    "lora": (BIASED, {"target_modules": "all-linear"}),
    "rslora": (BIASED, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "dora": (BIASED, {"target_modules": ["q_proj", "o_proj", "up_proj"], "use_dora": True}),
    "patterns": (BIASED, {"target_modules": ["q_proj", "o_proj"], **PATTERNS}),
    "dora_some_layers": (
        BIASED,
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2], "use_dora": True, "use_rslora": True},
    ),
    "a_regular_expression": (BIASED, {"target_modules": r"model\.layers\.[12]\..*(gate|k)_proj"}),
    "modules_to_save": (BIASED, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "biases": (BIASED, {"target_modules": ["v_proj"], "bias": "all"}),
    "tied_embedding": (
        tiny.hf_config(),
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tokens_tied": (tiny.hf_config(), {"target_modules": ["v_proj"], "trainable_token_indices": [9, 5, 6]}),
    "tokens_untied": (
        BIASED,
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [9, 5, 6, 40], "lm_head": [7, 50]}},
    ),
    "tokens_scaled": (CASES["gemma"], {"target_modules": ["v_proj"], "trainable_token_indices": list(range(5, 50))}),
    "fused": (CASES["phi3"], {"target_modules": ["qkv_proj", "down_proj"]}),
    "by_head": (CASES["gpt_neox"], {"target_modules": ["query_key_value", "dense"]}),
    "conv1d": (CASES["gpt2"], {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d_dora": (CASES["gpt2"], {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
    "fused_dora": (CASES["phi3"], {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
}
SCORE = {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "down_proj"]}


def made(directory, config, told, kind=transformers.AutoModelForCausalLM):
    """An adapter by PEFT, its parameters moved away from their start, saved beside its base."""
    tiny.write(directory / "base", config, tiny.tensors(config))
    torch.manual_seed(0)
    options = {"num_labels": 1} if "task_type" in told else {}
    base = kind.from_pretrained(directory / "base", dtype=torch.float32, attn_implementation="eager", **options)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | told)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory / "adapter")
    return model


def theirs_of(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def ours_of(model, params):
    hidden = model.apply(params, tiny.causal(IDS))[0]
    if model.config.head == "score":
        return np.asarray(hidden @ model.score_kernel(params))
    return np.asarray(logits(hidden, model.head(params)))


def beside(directory):
    """The model with the adapter beside its kernels, its whole parameters and those that were trained."""
    config = read_config(directory, **tiny.SETTINGS)
    saved = saved_adapters.read(directory, config)
    own = jax.tree.map(jnp.asarray, saved.leaves)
    merged = hf.load(directory, **tiny.SETTINGS)[1]  # its tensors that were trained whole are those of the adapter
    base_config = read_config(directory.parent / "base", **tiny.SETTINGS, head=config.head)
    base = hf.load(directory.parent / "base", **tiny.SETTINGS, head=config.head, key=jax.random.key(0))[1]
    updated = {f"layers/{path}/kernel" for path, _ in saved.adapter.updates}
    updated |= {table for table, _ in saved.token_rows.ranges} if saved.token_rows else set()
    rest = join(split(merged, lambda path: path not in updated)[0], split(base, lambda path: path in updated)[0])
    assert base_config == config
    names = config.family.names
    whole = {row.path for name in saved.tensors for row in names.find(name)[0].rows}
    trained = join(own, split(rest, lambda path: path in whole)[0]) if whole & _paths(rest) else own
    config = dataclasses.replace(config, adapter=saved.adapter, token_rows=saved.token_rows)
    return Model(config), join(rest, own), trained


def _paths(tree):
    return {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def check_added(on, off, their_on, their_off):
    """Logits to 1e-4, and what the adapter adds to 1e-5 by norm."""
    np.testing.assert_allclose(on, their_on, rtol=0, atol=1e-4)
    added, their_added = on - off, their_on - their_off
    assert np.linalg.norm(their_added) > 1e-2 * np.linalg.norm(their_off)
    assert np.linalg.norm(added - their_added) <= 1e-5 * np.linalg.norm(their_added)


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_peft_saved_computes_the_same(tmp_path, case):
    oracle = made(tmp_path, *ADAPTERS[case])
    on, off = theirs_of(oracle), theirs_of(torch_model(tmp_path / "base"))
    model, params, _ = beside(tmp_path / "adapter")
    base, base_params = hf.load(tmp_path / "base", **tiny.SETTINGS)
    check_added(ours_of(model, params), ours_of(base, base_params), on, off)
    merged = ours_of(*hf.load(tmp_path / "adapter", **tiny.SETTINGS))
    np.testing.assert_allclose(merged, on, rtol=0, atol=1e-4)
    np.testing.assert_allclose(merged, theirs_of(oracle.merge_and_unload()), rtol=0, atol=1e-4)


OURS = {
    "lora": (BIASED, Rules(4, 8.0)),
    "rslora_patterns": (
        BIASED,
        Rules(4, 8.0, ("q_proj", "o_proj"), (("layers.1.*q_proj", 6),), (("o_proj", 3.0),), rslora=True),
    ),
    "dora_some_layers": (BIASED, Rules(4, 8.0, (r"layers\.[02].*(q|down)_proj",), dora=True)),
    "fused": (CASES["phi3"], Rules(4, 8.0)),
    "fused_varied": (
        CASES["phi3"],
        Rules(4, 8.0, ("layers/attention/query", "layers/attention/value"), (("value", 2),), (("value", 3.0),)),
    ),
    "fused_dora": (CASES["phi3"], Rules(4, 8.0, dora=True)),
    "by_head": (CASES["gpt_neox"], Rules(4, 8.0)),
    "conv1d": (CASES["gpt2"], Rules(4, 8.0)),
    "conv1d_dora": (CASES["gpt2"], Rules(4, 8.0, (r"attn\.c_proj", "c_attn"), dora=True)),
    "by_head_dora": (CASES["gpt_neox"], Rules(4, 8.0, dora=True)),
    "gemma": (CASES["gemma2"], Rules(4, 8.0)),
}


def trained(directory, config, rules, whole=(), ids=None, **settings):
    """A model with an adapter of ours whose parameters have moved, and which of them are trained."""
    tiny.write(directory / "base", config, tiny.tensors(config))
    base, params = hf.load(directory / "base", **tiny.SETTINGS, **settings)
    tokens = TokenRows.of(ids or {})
    model = Model(dataclasses.replace(base.config, adapter=adapters.make(base.config, rules), token_rows=tokens))
    if tokens is not None:
        params = hf.load(directory / "base", **tiny.SETTINGS, **settings, token_rows=tokens)[1]
    params = join(params, model.init_adapter(jax.random.key(0), params["layers"]))
    rng = np.random.default_rng(1)

    def moved(path, x):
        name = "/".join(k.key for k in path)
        there = np.asarray(x) != 0 if name.endswith("lora_a") else 1  # ranks stay what they are
        return x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) * there if trains(name) else x

    def trains(name):
        return is_adapter(name) or name.startswith(("score/", *whole)) or table_of(name) is not None

    params = jax.tree_util.tree_map_with_path(moved, params)
    before = split(params, lambda name: not is_adapter(name) and table_of(name) is None)[0]
    return model, params, split(params, trains)[0], (base, before)


def loaded_by_peft(directory, kind=transformers.AutoModelForCausalLM, **options):
    """PEFT's model of an export, no key of which is missing or left over."""
    base = kind.from_pretrained(directory.parent / "base", dtype=torch.float32, attn_implementation="eager", **options)
    model = PeftModel.from_pretrained(base, directory).eval()
    there = load_file(directory / saved_adapters.WEIGHTS)
    again = peft.get_peft_model_state_dict(model)
    again = {f"{k}.weight" if k.endswith("magnitude_vector") else k: v for k, v in again.items()}
    assert there.keys() == again.keys()
    for name, value in there.items():
        np.testing.assert_array_equal(again[name].numpy(), value)
    return model


@pytest.mark.parametrize("case", OURS)
def test_what_is_exported_computes_the_same_in_peft(tmp_path, case):
    model, params, own, base = trained(tmp_path, *OURS[case])
    hf.save(tmp_path / "out", model, own, base=str(tmp_path / "base"))
    oracle = loaded_by_peft(tmp_path / "out")
    check_added(ours_of(model, params), ours_of(*base), theirs_of(oracle), theirs_of(torch_model(tmp_path / "base")))
    whole, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    np.testing.assert_allclose(theirs_of(whole), ours_of(model, params), rtol=0, atol=1e-4)
    hf.save(tmp_path / "merged", model, params, source=tmp_path / "base")
    np.testing.assert_allclose(theirs_of(torch_model(tmp_path / "merged")), ours_of(model, params), rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        ours_of(*hf.load(tmp_path / "out", **tiny.SETTINGS)), ours_of(model, params), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_norms_trained_beside_it(tmp_path, tied):
    config = tiny.hf_config(tie_word_embeddings=tied)
    whole = ("embed/", "norm/", "layers/mlp_norm/", *(() if tied else ("lm_head/",)))
    model, params, own, _ = trained(tmp_path, config, Rules(4, 8.0, ("q_proj",)), whole)
    hf.save(tmp_path / "out", model, own, base=str(tmp_path / "base"))
    oracle = loaded_by_peft(tmp_path / "out")
    np.testing.assert_allclose(theirs_of(oracle), ours_of(model, params), rtol=0, atol=1e-4)
    merged = hf.load(tmp_path / "out", **tiny.SETTINGS)
    np.testing.assert_allclose(ours_of(*merged), ours_of(model, params), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["tied", "untied", "gemma2", "gpt2"])
def test_vectors_of_tokens_trained_beside_it(tmp_path, case):
    config = CASES.get(case) or tiny.hf_config(tie_word_embeddings=case == "tied")
    rules = Rules(4, 8.0, (r"layers/attention/query",))
    ids = {EMBEDDING: [3, 4, 5, 17]} | ({HEAD: [0, 4]} if case == "untied" else {})
    model, params, own, base = trained(tmp_path, config, rules, ids=ids)
    hf.save(tmp_path / "out", model, own, base=str(tmp_path / "base"))
    oracle = loaded_by_peft(tmp_path / "out")
    check_added(ours_of(model, params), ours_of(*base), theirs_of(oracle), theirs_of(torch_model(tmp_path / "base")))
    hf.save(tmp_path / "merged", model, params, source=tmp_path / "base")
    np.testing.assert_allclose(theirs_of(torch_model(tmp_path / "merged")), ours_of(model, params), rtol=0, atol=1e-4)
    merged = hf.load(tmp_path / "out", **tiny.SETTINGS)
    np.testing.assert_allclose(ours_of(*merged), ours_of(model, params), rtol=0, atol=1e-4)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    name = model.config.family.names.row_of(EMBEDDING).name
    assert np.flatnonzero((before[name] != after[name]).any(1)).tolist() == ids[EMBEDDING]


def scores_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()[:, 0]


def test_the_score_head_of_peft_is_read_and_merged(tmp_path):
    kind = transformers.AutoModelForSequenceClassification
    oracle = made(tmp_path, tiny.hf_config(), SCORE, kind)
    theirs = scores_of(oracle, IDS)  # at the last token, which is no padding
    on = ours_of(*hf.load(tmp_path / "adapter", **tiny.SETTINGS))
    assert on.shape == (*IDS.shape, 1)
    np.testing.assert_allclose(on[:, -1, 0], theirs, rtol=0, atol=1e-4)
    model, params, own = beside(tmp_path / "adapter")
    np.testing.assert_allclose(ours_of(model, params)[:, -1, 0], theirs, rtol=0, atol=1e-4)
    hf.save(tmp_path / "again", model, own, base=str(tmp_path / "base"))
    np.testing.assert_array_equal(scores_of(loaded_by_peft(tmp_path / "again", kind, num_labels=1), IDS), theirs)


def test_a_score_head_leaves_with_the_adapter_and_merged(tmp_path):
    kind = transformers.AutoModelForSequenceClassification
    settings = {"head": "score", "key": jax.random.key(3)}
    model, params, own, _ = trained(tmp_path, tiny.hf_config(), Rules(4, 8.0), **settings)
    ours = ours_of(model, params)[:, -1, 0]
    hf.save(tmp_path / "out", model, own, base=str(tmp_path / "base"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    oracle = loaded_by_peft(tmp_path / "out", kind, num_labels=1)
    np.testing.assert_allclose(scores_of(oracle, IDS), ours, rtol=0, atol=1e-4)
    hf.save(tmp_path / "merged", model, params, source=tmp_path / "base")
    np.testing.assert_allclose(scores_of(torch_model(tmp_path / "merged", kind), IDS), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_of_one_step(tmp_path, dora):
    """Of A, B and the magnitudes, to 1e-4 by norm."""
    told = {"target_modules": ["q_proj", "down_proj"], "use_dora": dora, **PATTERNS}
    oracle = made(tmp_path, BIASED, told)
    model, params, _ = beside(tmp_path / "adapter")

    def loss(own, rest):
        hidden = model.apply(join(rest, own), tiny.causal(IDS))[0]
        found = jax.nn.log_softmax(logits(hidden, model.head(join(rest, own)))[:, :-1])
        return -jnp.take_along_axis(found, IDS[:, 1:, None], -1).mean()

    own, rest = split(params, is_adapter)
    mine = jax.grad(loss)(own, rest)
    ids = torch.tensor(IDS)
    torch.nn.functional.cross_entropy(oracle(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = {name: p.grad.numpy() for name, p in oracle.named_parameters() if p.grad is not None}
    compared = 0
    for path, update in model.config.adapter.updates:
        row = model.config.family.names.row_of(f"layers/{path}/kernel")
        for layer in range(3):
            at = f"base_model.model.{row.named((layer,)).removesuffix('.weight')}"
            ends = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
            ends |= {"magnitude": "lora_magnitude_vector.default.weight"} if dora else {}
            for name, end in ends.items():
                part, node = getattr(saved_adapters.Lies.of(row), name), mine["layers"]
                for key in (*path.split("/"), name):
                    node = node[key]
                rank = update.ranks[layer]
                array = np.asarray(node[layer])
                array = {"lora_a": array[..., :rank], "lora_b": array[:rank]}.get(name, array)
                array = part.to_theirs(array, saved_adapters.sizes(model.config) | {"R": rank})
                assert np.linalg.norm(array - theirs[f"{at}.{end}"]) <= 1e-4 * np.linalg.norm(theirs[f"{at}.{end}"])
                compared += 1
    assert compared == len(theirs)


@pytest.mark.parametrize("dora", [False, True])
def test_a_real_base(tmp_path, shared, dora):
    """Trained weights: 5 layers, 260 K parameters."""
    base = shared / "models" / "stories260k-llama"
    (tmp_path / "base").symlink_to(base)
    model, params = hf.load(base, **tiny.SETTINGS)
    model = Model(dataclasses.replace(model.config, adapter=adapters.make(model.config, Rules(8, 16.0, dora=dora))))
    plain, params = params, join(params, model.init_adapter(jax.random.key(0), params["layers"]))
    rng = np.random.default_rng(1)
    own, rest = split(params, is_adapter)
    own = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), own)
    hf.save(tmp_path / "out", model, own, base=str(base), source=base)
    on, off = ours_of(model, join(rest, own)), ours_of(Model(dataclasses.replace(model.config, adapter=None)), plain)
    check_added(on, off, theirs_of(loaded_by_peft(tmp_path / "out")), theirs_of(torch_model(base)))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.encode("Once upon a time") == transformers.AutoTokenizer.from_pretrained(base).encode(
        "Once upon a time"
    )

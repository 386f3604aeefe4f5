"""Every family against transformers' own class on torch, both ways; values are kept for the tests without torch."""

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.auto import modeling_auto

from jaxalign.models import families, hf
from jaxalign.ops.logits import logits
from jaxalign.rollout.continuous import continue_prompts
from jaxalign.rollout.sampling import Sampling
from tests.models import tiny_models as tiny
from tests.models.test_golden_models import FIXED_IDS, summary
from tests.models.tiny_families import CASES, FORMS, WITH_IMAGES
from tests.oracle.test_models_llama import check_same, torch_model


def written(directory, case, **changes):
    """A checkpoint in shards that transformers wrote from numpy's weights, and its model."""
    config = CASES[case] | changes
    tiny.write(directory / "numpy", config, tiny.tensors(config))
    oracle = torch_model(directory / "numpy")
    assert type(oracle).__name__ == config["architectures"][0]
    oracle.save_pretrained(directory / "torch", max_shard_size="20KB")
    assert len(list((directory / "torch").glob("model-*.safetensors"))) > 2
    return oracle


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(tmp_path, case):
    oracle = written(tmp_path, case)
    model, params = hf.load(tmp_path / "torch", **tiny.SETTINGS)
    assert model == hf.load(tmp_path / "numpy", **tiny.SETTINGS)[0]  # both forms of config.json say the same
    theirs = check_same(model, params, oracle, FIXED_IDS["tiny"])
    tiny.golden(f"tiny_{case}", lambda: summary(*theirs))


# Text that grows has other frequencies at each length there, and cached keys keep those that they were turned by.
@pytest.mark.parametrize("case", [case for case in CASES if case != "llama_dynamic"])
def test_an_export_loads_and_generates_the_same(tmp_path, case):
    """No key is missing or left over; logits are the same, and greedy text from a cache longer than the windows."""
    written(tmp_path, case)
    model, params = hf.load(tmp_path / "torch", **tiny.SETTINGS)
    params["norm"]["scale"] = params["norm"]["scale"] * 1.25
    hf.save(tmp_path / "out", model, params, source=tmp_path / "torch", max_bytes=20_000)
    oracle, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert type(oracle).__name__ == CASES[case]["architectures"][0]
    rows = tiny.causal(FIXED_IDS["tiny"])
    mine = logits(model.apply(params, rows)[0], model.head(params))
    with torch.no_grad():
        theirs = oracle(torch.tensor(np.asarray(rows.tokens)).long()).logits.numpy()
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)

    prompts = [np.asarray(rows.tokens[0, :n], np.int32) for n in (3, 14)]
    done, _ = continue_prompts(
        model, params, prompts, jax.random.key(0), num_slots=2, sampling=Sampling(0.0, 20), stop_ids=()
    )
    cached = CASES[case].get("sliding_window") != 1  # transformers' cache of such a layer keeps all keys
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "use_cache": cached}
    for prompt, found in zip(prompts, done, strict=True):
        text = oracle.eval().generate(torch.tensor(prompt)[None].long(), **options)[0].tolist()
        assert found.ids == text[len(prompt) :]


@pytest.mark.parametrize(
    "case",
    [
        "qwen2_windows",
        "qwen3_windows",
        "mistral",
        "ministral",
        "ministral3",
        "olmo2",
        "gemma",
        "gemma2",
        "gemma3",
        "olmo3",
        "smollm3",
        "phi3_long",
        "gpt_neox",
        "gpt2",
    ],
)
def test_reward_models_both_ways(tmp_path, case):
    """transformers' sequence classifier scores the same here, and one of ours there."""
    name = families.find(CASES[case]).architectures["score"]
    config = CASES[case] | {"architectures": [name], "num_labels": 1, "id2label": {"0": "LABEL_0"}}
    tiny.write(tmp_path / "theirs", config, tiny.tensors(config))
    tokens = FIXED_IDS["tiny"]

    def scores(directory):
        oracle = torch_model(directory, transformers.AutoModelForSequenceClassification)
        assert type(oracle).__name__ == name
        with torch.no_grad():
            return oracle(torch.tensor(tokens)).logits[:, 0].numpy()

    model, params = hf.load(tmp_path / "theirs", **tiny.SETTINGS)
    hidden = model.apply(params, tiny.causal(tokens))[0]
    mine = (hidden @ model.score_kernel(params))[:, -1, 0]
    np.testing.assert_allclose(mine, scores(tmp_path / "theirs"), rtol=0, atol=1e-4)
    params["score"]["kernel"] = params["score"]["kernel"] * -2
    hf.save(tmp_path / "mine", model, params)
    np.testing.assert_allclose(-2 * mine, scores(tmp_path / "mine"), rtol=0, atol=2e-4)


_BOTH = ["qwen3", "gemma2", "smollm3"]


@pytest.mark.parametrize("case, kind", [("olmo2", "score"), *((c, k) for c in _BOTH for k in ("score", "tokens"))])
def test_classifiers_of_several_labels(tmp_path, case, kind):
    """The same numbers here, and in the export there; two labels, which transformers leaves out of the file."""
    family = families.find(CASES[case])
    auto = {
        "score": transformers.AutoModelForSequenceClassification,
        "tokens": transformers.AutoModelForTokenClassification,
    }[kind]
    config = CASES[case] | {"architectures": [family.architectures[kind]]}
    tiny.write(tmp_path / "numpy", config, tiny.tensors(config))
    first = torch_model(tmp_path / "numpy", auto).eval()
    first.save_pretrained(tmp_path / "torch")
    model, params = hf.load(tmp_path / "torch", **tiny.SETTINGS)
    assert model == hf.load(tmp_path / "numpy", **tiny.SETTINGS)[0]
    hf.save(tmp_path / "mine", model, params, source=tmp_path / "torch")
    tokens = FIXED_IDS["tiny"]
    mine = model.apply(params, tiny.causal(tokens))[0] @ model.score_kernel(params) + params["score"].get("bias", 0)
    for oracle in (first, torch_model(tmp_path / "mine", auto).eval()):
        assert type(oracle).__name__ == family.architectures[kind]
        with torch.no_grad():
            theirs = oracle(torch.tensor(tokens)).logits.numpy()
        assert theirs.shape[-1] == 2
        np.testing.assert_allclose(mine if kind == "tokens" else mine[:, -1], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", WITH_IMAGES)
def test_the_text_part_beside_an_encoder_of_images(tmp_path, case, form):
    """A checkpoint that transformers wrote gives its logits for text; an export is a text model there."""
    config = transformers.AutoConfig.for_model(**WITH_IMAGES[case])
    torch.manual_seed(0)
    oracle = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for value in oracle.parameters():
            value += 0.1 * torch.randn(value.shape)
    oracle.save_pretrained(tmp_path / "images", max_shard_size="20KB" if form == "old" else "1GB")
    if form == "new":
        safetensors.torch.save_file(
            {
                k: v.contiguous()
                for k, v in oracle.state_dict().items()
                if not (k == "lm_head.weight" and _tied(oracle))
            },
            tmp_path / "images" / "model.safetensors",
            {"format": "pt"},
        )
    found = list(hf.list_tensors(tmp_path / "images"))
    assert {FORMS[form]("model.norm.weight"), FORMS[form]("model.embed_tokens.weight")} <= set(found)
    assert any("vision_tower" in name for name in found) and any("multi_modal_projector" in name for name in found)
    model, params = hf.load(tmp_path / "images", **tiny.SETTINGS)
    rows = tiny.causal(FIXED_IDS["tiny"] % 60)
    tokens = torch.tensor(np.asarray(rows.tokens)).long()
    hf.save(tmp_path / "out", model, params, source=tmp_path / "images")
    text, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert type(text).__name__ == CASES[case]["architectures"][0]
    mine = logits(model.apply(params, rows)[0], model.head(params))
    for theirs in (oracle, text):
        with torch.no_grad():
            np.testing.assert_allclose(mine, theirs(tokens).logits.numpy(), rtol=0, atol=1e-4)


def _tied(model):
    return model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_the_classes_that_transformers_has(family):
    """Those of a family's table are the ones that it makes of such a file, but for what the table calls its own."""
    kinds = {"lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    kinds["score"] = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    for kind in family.model_types:
        for head, names in kinds.items():
            assert names.get(kind) == (None if head in family.only_here else family.architectures[head])

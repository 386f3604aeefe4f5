"""Reading config.json: both forms of it, and an error for every field that would be ignored."""

import json

import pytest

from jaxalign.errors import InputError
from jaxalign.models.config import from_hf
from jaxalign.ops.rope import Rope
from tests.models.tiny_models import SETTINGS, hf_config

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(head=None, **changes):
    fields = {k: v for k, v in hf_config(**changes).items() if v != "absent"}
    return from_hf(fields, head=head, **SETTINGS)


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "mixtral"),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("sliding_window", 4096),
        ("quantization_config", {"quant_method": "gptq"}),
        ("logit_scale", 0.0625),
        ("qk_norm", True),
        ("partial_rotary_factor", 0.5),
        ("is_encoder_decoder", True),
        ("architectures", ["LlamaForQuestionAnswering"]),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("vocab_size", None),
        ("num_hidden_layers", 2.5),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", -1e-5),
        ("initializer_range", [0.02]),
        ("tie_word_embeddings", "false"),
        ("attention_bias", "yes"),
        ("rope_theta", "1e4"),
        ("rope_parameters", "linear"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("rope_scaling", ["linear"]),
        ("rope_theta", 123.0),  # rope_parameters says otherwise
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "short_factor": [1.0]}),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0.5}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "truncate": "no"}),
        ("rope_parameters", {"rope_type": "proportional", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "dynamic"}),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("rope_parameters", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}),
        ("rope_parameters", {"rope_type": "longrope", "short_factor": [1.0] * 4}),
        ("rope_parameters", {"rope_type": "longrope", "short_factor": [0.0] * 4, "long_factor": [1.0] * 4}),
        ("rope_parameters", {"rope_type": "linear"}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}),
        ("rope_parameters", LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 8.0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),  # beside rope_parameters of another type
    ],
)
def test_trap_a_field_that_is_not_honoured_is_named(field, value):
    """TRAPS.md, RoPE scaling left out: whatever the config names is computed, or an error names it."""
    with pytest.raises(InputError) as error:
        read(**{field: value})
    named = {"head_dim": "head_dim", "rope_parameters": "rope_", "rope_scaling": "rope_scaling"}.get(field, field)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "changes, rope",
    [
        ({"rope_parameters": "absent"}, Rope()),
        ({"rope_parameters": "absent", "rope_theta": 5e5}, Rope(theta=5e5)),
        ({"rope_parameters": "absent", "rope_scaling": None, "rope_theta": 1e4}, Rope()),
        ({"rope_parameters": "absent", "rope_scaling": {"type": "linear", "factor": 2}}, Rope("linear", 1e4, 2.0)),
        (
            {"rope_parameters": "absent", "rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
            Rope("llama3", 5e5, 8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
            Rope("llama3", 5e5, 8.0, 1.0, 4.0, 8192),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 7.0}, Rope(theta=7.0)),
    ],
)
def test_both_forms_of_rope(changes, rope):
    assert read(**changes).rope == rope


def test_defaults_are_those_of_transformers():
    config = read(**dict.fromkeys(["num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"], "absent"))
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.tied) == (4, 8, 1e-6, False)
    assert read(head_dim=None, num_key_value_heads=None).num_kv_heads == 4
    nulls = read(rms_norm_eps=None, initializer_range=None, tie_word_embeddings=None, rope_parameters=None)
    assert (nulls.norm_eps, nulls.initializer_range, nulls.tied, nulls.rope) == (1e-6, 0.02, False, Rope())
    with pytest.raises(InputError, match="a multiple of num_attention_heads 4"):
        read(head_dim=None, hidden_size=33)


def test_harmless_fields_pass():
    read(
        is_llama_config=True, rope_interleaved=False, unsloth_fixed=True, **{"transformers.js_config": {"dtype": "q4"}}
    )
    read(pretraining_tp=2, _name_or_path="x", unsloth_version="1", temperature=0.6, sliding_window=None, use_mla=False)
    assert read(hidden_act="swish") == read()


def test_heads():
    assert read().head == "lm"
    classifier = {"architectures": ["LlamaForSequenceClassification"]}
    assert read(**classifier).head == "score"
    assert read(**classifier, id2label={"0": "LABEL_0"}).head == "score"
    assert read(head="score").head == "score"
    assert read(**classifier, id2label={"0": "LABEL_0"}) == read(**classifier, num_labels=1) == read(head="score")
    two = {"id2label": {"0": "a", "1": "b"}}
    for labels in ({}, two, {"num_labels": 2}):  # transformers writes no labels where there are two
        assert (read(**classifier, **labels).num_labels, read(**classifier, **labels).score_bias) == (2, None)
        with pytest.raises(InputError, match="2 labels"):
            read(**classifier, **labels, head="score")
    with pytest.raises(InputError, match="id2label"):
        read(**classifier, **two, num_labels=3)
    tokens = {"architectures": ["LlamaForTokenClassification"], "num_labels": 1}
    assert (read(**tokens).head, read(**tokens).num_labels, read(**tokens).score_bias) == ("score", None, True)
    assert read(**tokens, token_classification_bias=False).score_bias is False
    with pytest.raises(InputError, match="LlamaForTokenClassification"):
        read(**tokens, head="score")
    with pytest.raises(InputError, match="head"):
        read(head="value")


def test_original_fields_are_kept():
    config = read(my_version="3")
    assert config.hf == hf_config(my_version="3")
    assert json.loads(config.hf_config)["my_version"] == "3"

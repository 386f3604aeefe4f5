"""The one description of a model that everything is derived from, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.errors import InputError
from jaxalign.models.hub import CONFIG, read_json
from jaxalign.ops.rope import KINDS, Rope

HEADS = ("lm", "score")
REMAT = ("none", "dots", "offload", "full")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; family differences are fields."""

    vocab_size: int  # V
    num_layers: int  # L
    embed_dim: int  # D
    mlp_dim: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    norm_eps: float
    rope: Rope
    tied: bool  # the head is the embedding transposed
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float
    head: str  # "lm": token logits; "score": one number a token
    dtype: str  # of the computation
    param_dtype: str  # of the parameters
    # What the backward pass keeps: "none": everything; "dots": matrix products; "offload": these, in the host's memory;
    # "full": layer inputs.
    remat: str
    attention: str | None = None  # a backend of `jaxalign.ops.attention`; None: what suits the platform
    # What is promised of all rows: no token sees a later one ("rows"), or none of a later position nor another of its
    # own ("positions": pairs around the prompt that they share); None: nothing.
    causal: str | None = None
    hf_config: str = dataclasses.field(default="{}", compare=False, repr=False)  # the original JSON, for export

    @property
    def hf(self) -> dict[str, Any]:
        """The original `config.json`, every field of it."""
        return json.loads(self.hf_config)


# Fields that say nothing of a forward pass: bookkeeping, token ids, generation defaults of old files.
_BOOKKEEPING_NAMES = """
    architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range label2id length_penalty max_length max_position_embeddings max_sequence_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id pretraining_tp prefix problem_type remove_invalid_values
    is_llama_config transformers.js_config unsloth_fixed
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache use_return_dict
"""  # pretraining_tp splits products into parts that are summed: the same mathematics

_HONOURED_NAMES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings attention_bias mlp_bias
"""
_BOOKKEEPING, _HONOURED = frozenset(_BOOKKEEPING_NAMES.split()), frozenset(_HONOURED_NAMES.split())

# Values at which a field that is not honoured changes nothing.
_NEUTRAL: Mapping[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
}

_ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Beyond these a number is a mistake: the shapes of such a model alone would take hours.
_MOST: Mapping[str, int] = {
    "vocab_size": 1 << 28,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 40,
}
_MOST_NUMBERS = 10**14  # of a whole model


def read_config(directory: Path, **settings: Any) -> ModelConfig:
    """Reads and checks the `config.json` in a model's directory; it comes before anything else there is read.

    Args:
      directory: on this host, see `hub.locate`.
      settings: `dtype`, `param_dtype`, `remat` and `head`, as `from_hf` takes them.

    Raises:
      InputError: naming the file, and the field that is missing or wrong.
    """
    hf = read_json(directory / CONFIG)
    try:
        return from_hf(hf, **settings)
    except InputError as error:
        problem = error.problem.replace("in config.json", f"in {directory / CONFIG}")
        raise InputError(problem, error.expected, error.fix, error.places) from error


def from_hf(hf: Mapping[str, Any], *, dtype: str, param_dtype: str, remat: str, head: str | None = None) -> ModelConfig:
    """Reads a Hugging Face config of the Llama family.

    Args:
      hf: the parsed `config.json`, of transformers 5 (`rope_parameters`) or older (`rope_theta`, `rope_scaling`).
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: what the backward pass recomputes, one of `REMAT`.
      head: "lm", "score", or None for what `architectures` names.

    Returns:
      The model's description.

    Raises:
      InputError: naming a field that changes the mathematics and is not honoured, or that is missing or wrong.
    """
    if hf.get("model_type") != "llama":
        raise InputError(
            f"model_type {_shown(hf.get('model_type'))} in config.json",
            "'llama'",
            "--config.model.path=a Llama checkpoint",
        )
    for name, value in hf.items():
        _check_field(name, value)
    architectures = hf.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(architectures, list) or architectures[0] not in (
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
    ):
        raise InputError(
            f"architectures {_shown(architectures)} in config.json",
            "LlamaForCausalLM or LlamaForSequenceClassification",
            "--config.model.path=such a checkpoint",
        )
    if head is None:
        head = "score" if architectures[0] == "LlamaForSequenceClassification" else "lm"
    _one_of("head", head, HEADS)
    _one_of("remat", remat, REMAT)
    labels = hf.get("id2label")
    if not isinstance(labels, (Mapping, type(None))):
        raise _wrong("id2label", labels, "an object of names by number, or no such field")
    if "max_position_embeddings" in hf:
        _integer(hf, "max_position_embeddings")
    ends, vocabulary = token_ids(hf, "eos_token_id"), _integer(hf, "vocab_size")
    if any(i >= vocabulary for i in ends):
        raise _wrong("eos_token_id", hf["eos_token_id"], f"an id of the vocabulary, below {vocabulary}")
    if architectures[0] == "LlamaForSequenceClassification" and labels is not None and len(labels) != 1:
        raise InputError(
            f"id2label with {len(labels)} labels in config.json",
            "one label: the score of a reward model",
            "--config.model.path=a checkpoint with num_labels 1",
        )
    heads, embed = _integer(hf, "num_attention_heads"), _integer(hf, "hidden_size")
    kv_heads = _integer(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise _wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    head_dim = _integer(hf, "head_dim", embed // heads)
    if hf.get("head_dim") is None and embed % heads:
        raise _wrong("hidden_size", embed, f"a multiple of num_attention_heads {heads}, or a head_dim")
    if head_dim % 2:
        raise _wrong("head_dim", head_dim, "an even number: rotary embeddings turn pairs")
    config = ModelConfig(
        vocab_size=vocabulary,
        num_layers=_integer(hf, "num_hidden_layers"),
        embed_dim=embed,
        mlp_dim=_integer(hf, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_number("rms_norm_eps", hf.get("rms_norm_eps"), 1e-6),
        rope=_rope(hf),
        tied=_flag(hf, "tie_word_embeddings"),
        attention_bias=_flag(hf, "attention_bias"),
        mlp_bias=_flag(hf, "mlp_bias"),
        initializer_range=_number("initializer_range", hf.get("initializer_range"), 0.02),
        head=head,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        hf_config=json.dumps(dict(hf)),
    )
    if (count := _count(config)) > _MOST_NUMBERS:
        raise InputError(
            f"the sizes in config.json make {count:.0e} parameters",
            f"at most {_MOST_NUMBERS:.0e}",
            "the checkpoint's own config.json",
        )
    return config


def _count(c: ModelConfig) -> int:
    """Parameters, but for norms and biases."""
    attention = 2 * c.embed_dim * c.head_dim * (c.num_heads + c.num_kv_heads)
    layer = attention + 3 * c.embed_dim * c.mlp_dim
    return c.num_layers * layer + c.vocab_size * c.embed_dim * (1 if c.tied else 2)


def token_ids(hf: Mapping[str, Any], name: str, file: str = CONFIG) -> list[int]:
    """The ids in a field that holds one, several, or null.

    Raises:
      InputError: something else is there.
    """
    value = hf.get(name)
    found = value if isinstance(value, list) else [value]
    ids = [i for i in found if i is not None]
    if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise InputError(
            f"{name} is {_shown(value)} in {file}",
            "a token id, a list of them, or null",
            f"the checkpoint's own {file}",
        )
    return [i for i in ids if i >= 0]  # files of old say -1 for none


def _check_field(name: str, value: Any) -> None:
    if name in _HONOURED or name in _BOOKKEEPING or name.startswith("_") or name.endswith("_version"):
        return
    if name in _NEUTRAL:
        if value in _NEUTRAL[name]:
            return
        expected = " or ".join(repr(v) for v in _NEUTRAL[name] if v is not None)
    else:
        if not value:  # None, False, 0, "" and empty lists switch a feature off
            return
        expected = "no such field, or one that is off: jaxalign does not compute it, so the model would be another one"
    raise _wrong(name, value, expected)


def _wrong(name: str, value: Any, expected: str) -> InputError:
    required = name in _MOST
    return InputError(
        f"{name} is {_shown(value)} in config.json",
        expected,
        "the checkpoint's own config.json"
        if required
        else f"another checkpoint, or config.json without {name} if it is wrong",
    )


def _shown(value: Any) -> str:
    """A value as it is written, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 80 else text[:77] + "..."


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}", f"one of {', '.join(allowed)}", f"--config.model.{name}={allowed[0]}")


def _integer(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = hf.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(name, value, "a positive whole number")
    if value > _MOST[name]:
        raise _wrong(name, value, f"at most {_MOST[name]:,}")
    return value


def _number(name: str, value: Any, default: float | None) -> float:
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise _wrong(name, value, "a positive number")
    return float(value)


def _flag(hf: Mapping[str, Any], name: str) -> bool:
    value = hf.get(name)
    if value not in (True, False, None):
        raise _wrong(name, value, "true or false")
    return bool(value)


def _rope(hf: Mapping[str, Any]) -> Rope:
    """The rotary embedding, from either form of config."""
    new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, (Mapping, type(None))):
            raise _wrong(name, value, "an object with a rope_type, or null")
    if new and old and _rope_type(new) != _rope_type(old):
        raise _wrong("rope_scaling", old, f"the same as rope_parameters {_shown(new)}")
    fields = dict(new or old or {})
    theta = fields.pop("rope_theta", None)
    theta = _number("rope_theta", hf.get("rope_theta") if theta is None else theta, 10_000.0)
    if hf.get("rope_theta") is not None and hf["rope_theta"] != theta:
        raise _wrong("rope_theta", hf["rope_theta"], f"the same as in rope_parameters, {theta:g}")
    kind = _rope_type(fields)
    fields.pop("rope_type", None), fields.pop("type", None)
    if kind not in KINDS:
        raise _wrong("rope_type", kind, f"one of {', '.join(KINDS)}")
    if kind == "llama3" and fields.get("original_max_position_embeddings") is None:
        fields["original_max_position_embeddings"] = hf.get("max_position_embeddings")
    for name in _ROPE_FIELDS[kind]:
        _number(f"rope_parameters.{name}", fields.get(name), None)
    for name, value in fields.items():
        if name in _ROPE_FIELDS[kind] or value is None or (name == "partial_rotary_factor" and value == 1):
            continue
        if kind == "default" and name in _ROPE_FIELDS["llama3"]:
            continue  # transformers ignores them for this type as well
        raise _wrong(f"rope_parameters.{name}", value, f"no such field for rope_type {kind!r}")
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(kind, theta, float(fields["factor"]))
    low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
    if high <= low:
        raise _wrong("rope_parameters.high_freq_factor", high, f"more than low_freq_factor {low:g}")
    return Rope(kind, theta, float(fields["factor"]), low, high, int(fields["original_max_position_embeddings"]))


def _rope_type(fields: Mapping[str, Any]) -> str:
    return str(fields.get("rope_type") or fields.get("type") or "default")

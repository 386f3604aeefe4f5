"""Fields of a Hugging Face `config.json`, read with the checks that every family needs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.errors import InputError
from jaxalign.models.hub import CONFIG
from jaxalign.ops.rope import KINDS, Rope, Yarn

# Fields that say nothing of a forward pass: bookkeeping, token ids, generation defaults of old files.
_BOOKKEEPING_NAMES = """
    architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range label2id length_penalty max_length max_position_embeddings max_sequence_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id pretraining_tp prefix problem_type remove_invalid_values
    transformers.js_config unsloth_fixed
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache use_return_dict
"""  # pretraining_tp splits matmuls into parts that are summed: the same mathematics
_BOOKKEEPING = frozenset(_BOOKKEEPING_NAMES.split())

_ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_YARN_OPTIONS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")

# Beyond these a number is a mistake: the shapes of such a model alone would take hours.
_MOST: Mapping[str, int] = {
    "vocab_size": 1 << 28,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "sliding_window": 1 << 30,
    "max_position_embeddings": 1 << 40,
}


def check_known(hf: Mapping[str, Any], honoured: frozenset[str], neutral: Mapping[str, tuple]) -> None:
    """Makes sure that every field is honoured, says nothing of a forward pass, or is switched off.

    Args:
      hf: the parsed `config.json`.
      honoured: fields that a family reads.
      neutral: the values at which a field that is not honoured changes nothing, by name.

    Raises:
      InputError: naming the first that would make another model.
    """
    for name, value in hf.items():
        if name in honoured or name in _BOOKKEEPING or name.startswith("_") or name.endswith("_version"):
            continue
        if name in neutral:
            if value in neutral[name]:
                continue
            expected = " or ".join(repr(v) for v in neutral[name] if v is not None)
        else:
            if not value:  # None, False, 0, "" and empty lists switch a feature off
                continue
            expected = (
                "no such field, or one that is off: jaxalign does not compute it, so the model would be another one"
            )
        raise wrong(name, value, expected)


def check_not_quantised(hf: Mapping[str, Any]) -> None:
    """Refuses weights that are held in fewer bits.

    Raises:
      InputError: naming the method.
    """
    if held := hf.get("quantization_config"):
        method = held.get("quant_method", held) if isinstance(held, Mapping) else held
        raise InputError(
            f"quantization_config {shown(method)} in config.json",
            "weights of 16 or 32 bits: jaxalign reads no quantised ones",
            "--config.model.path=the 16-bit checkpoint that this one was made from; its card says which",
        )


def decoder(
    hf: Mapping[str, Any], *, num_kv_heads: int | None = None, head_dim: int | None = None, norm_eps: float = 1e-6
) -> dict[str, Any]:
    """The fields of `ModelConfig` that every decoder with rotary positions and gated mlps has; no biases.

    Args:
      hf: the parsed `config.json`.
      num_kv_heads: where the file does not say; None: as many as query heads.
      head_dim: where the file does not say; None: what the hidden size gives each query head.
      norm_eps: where the file does not say.

    Raises:
      InputError: naming a field that is missing or wrong.
    """
    num_heads, num_kv_heads, head_dim = heads(hf, num_kv_heads, head_dim)
    return {
        "vocab_size": integer(hf, "vocab_size"),
        "num_layers": integer(hf, "num_hidden_layers"),
        "embed_dim": integer(hf, "hidden_size"),
        "mlp_dim": integer(hf, "intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": number("rms_norm_eps", hf.get("rms_norm_eps"), norm_eps),
        "rope": rope(hf),
        "tied": flag(hf, "tie_word_embeddings"),
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": number("initializer_range", hf.get("initializer_range"), 0.02),
    }


# What `decoder` reads, and `windows`.
_DECODER_NAMES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings
"""
DECODER = frozenset(_DECODER_NAMES.split())
WINDOWS = frozenset({"sliding_window", "layer_types"})
# Fields that are no others' business, at the values that the one transformer has.
NEUTRAL: Mapping[str, tuple] = {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1, None)}


def heads(hf: Mapping[str, Any], num_kv_heads: int | None = None, head_dim: int | None = None) -> tuple[int, int, int]:
    """Query heads, key heads and the size of each, of a family that turns pairs of a head's numbers by position.

    Args:
      hf: the parsed `config.json`.
      num_kv_heads: where the file does not say, as `decoder` takes it; null there means as many as query heads.
      head_dim: where the file does not say.

    Raises:
      InputError: sizes that do not go together.
    """
    num, embed = integer(hf, "num_attention_heads"), integer(hf, "hidden_size")
    silent = "num_key_value_heads" not in hf and num_kv_heads is not None
    num_kv = integer(hf, "num_key_value_heads", num_kv_heads if silent else num)
    if num % num_kv:
        raise wrong("num_key_value_heads", num_kv, f"a divisor of num_attention_heads {num}")
    own, head_dim = head_dim, integer(hf, "head_dim", head_dim or embed // num)
    if hf.get("head_dim") is None and own is None and embed % num:
        raise wrong("hidden_size", embed, f"a multiple of num_attention_heads {num}, or a head_dim")
    if head_dim % 2:
        raise wrong("head_dim", head_dim, "an even number: rotary embeddings turn pairs")
    return num, num_kv, head_dim


def windows(
    hf: Mapping[str, Any], window: int | None, slides: Callable[[int], bool] = lambda layer: True
) -> tuple[int | None, ...] | None:
    """Each layer's window, by `layer_types`; None where no layer has one.

    Args:
      hf: the parsed `config.json`.
      window: of the layers that have one; None: of none.
      slides: where there are no `layer_types`, which layers have it.

    Raises:
      InputError: types that are not one of each layer, or not known.
    """
    layers, types = integer(hf, "num_hidden_layers"), hf.get("layer_types")
    if types is None:
        types = [_FULL if window is None or not slides(i) else _SLIDING for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= {_FULL, _SLIDING}:
        raise wrong("layer_types", types, f"{layers} of {_FULL!r} and {_SLIDING!r}")
    if window is None and _SLIDING in types:
        raise wrong("layer_types", types, f"{_FULL!r} alone, where sliding_window is not set or not used")
    found = tuple(window if kind == _SLIDING else None for kind in types)
    return found if any(found) else None


def window_of(hf: Mapping[str, Any], default: int | None) -> int | None:
    """`sliding_window`, how many positions back a token sees, its own among them; None where it is null.

    Args:
      hf: the parsed `config.json`.
      default: where the file does not say.
    """
    return None if hf.get("sliding_window", default) is None else integer(hf, "sliding_window", default)


_FULL, _SLIDING = "full_attention", "sliding_attention"


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
            f"{name} is {shown(value)} in {file}",
            "a token id, a list of them, or null",
            f"the checkpoint's own {file}",
        )
    return [i for i in ids if i >= 0]  # files of old say -1 for none


def wrong(name: str, value: Any, expected: str) -> InputError:
    """What is said of a field's value."""
    required = name in _MOST
    return InputError(
        f"{name} is {shown(value)} in config.json",
        expected,
        "the checkpoint's own config.json"
        if required
        else f"another checkpoint, or config.json without {name} if it is wrong",
    )


def shown(value: Any) -> str:
    """A value as it is written, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 80 else text[:77] + "..."


def integer(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size, from 1 to what is no mistake; `default` where the field is missing or null."""
    value = hf.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise wrong(name, value, "a positive whole number")
    if value > _MOST.get(name, 1 << 40):
        raise wrong(name, value, f"at most {_MOST.get(name, 1 << 40):,}")
    return value


def whole_number(hf: Mapping[str, Any], name: str, default: int) -> int:
    """A count, which may be 0."""
    value = hf.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise wrong(name, value, "a whole number")
    return value


def number(name: str, value: Any, default: float | None) -> float:
    """A positive number."""
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise wrong(name, value, "a positive number")
    return float(value)


def flag(hf: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false; false where the field is null, `default` where it is missing."""
    value = hf.get(name, default)
    if value not in (True, False, None):
        raise wrong(name, value, "true or false")
    return bool(value)


def rope(hf: Mapping[str, Any]) -> Rope:
    """The rotary embedding, from either form of config."""
    new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, (Mapping, type(None))):
            raise wrong(name, value, "an object with a rope_type, or null")
    if new and old and _rope_type(new) != _rope_type(old):
        raise wrong("rope_scaling", old, f"the same as rope_parameters {shown(new)}")
    fields = dict(new or old or {})
    theta = fields.pop("rope_theta", None)
    theta = number("rope_theta", hf.get("rope_theta") if theta is None else theta, 10_000.0)
    if hf.get("rope_theta") is not None and hf["rope_theta"] != theta:
        raise wrong("rope_theta", hf["rope_theta"], f"the same as in rope_parameters, {theta:g}")
    kind = _rope_type(fields)
    fields.pop("rope_type", None), fields.pop("type", None)
    if kind not in KINDS:
        raise wrong("rope_type", kind, f"one of {', '.join(KINDS)}")
    if kind in ("llama3", "yarn") and fields.get("original_max_position_embeddings") is None:
        fields["original_max_position_embeddings"] = hf.get("max_position_embeddings")
    for name in _ROPE_FIELDS[kind]:
        number(f"rope_parameters.{name}", fields.get(name), None)
    for name, value in fields.items():
        if name in _ROPE_FIELDS[kind] or value is None or (name == "partial_rotary_factor" and value == 1):
            continue
        if kind == "default" and name in _ROPE_FIELDS["llama3"]:
            continue  # transformers ignores them for this type as well
        if kind == "yarn" and name in _YARN_OPTIONS:
            continue
        raise wrong(f"rope_parameters.{name}", value, f"no such field for rope_type {kind!r}")
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(kind, theta, float(fields["factor"]))
    if kind == "yarn":
        length = int(fields["original_max_position_embeddings"])
        return Rope(kind, theta, float(fields["factor"]), original_length=length, yarn=_yarn(fields))
    low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
    if high <= low:
        raise wrong("rope_parameters.high_freq_factor", high, f"more than low_freq_factor {low:g}")
    return Rope(kind, theta, float(fields["factor"]), low, high, int(fields["original_max_position_embeddings"]))


def _yarn(fields: Mapping[str, Any]) -> Yarn:
    """Without an `attention_factor` it is made of `factor`, as transformers' `_compute_yarn_parameters` does."""
    given = {name: fields[name] for name in _YARN_OPTIONS if fields.get(name) is not None}
    truncate = given.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise wrong("rope_parameters.truncate", truncate, "true or false")
    given = {name: number(f"rope_parameters.{name}", value, None) for name, value in given.items()}

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(fields["factor"]) + 1 if fields["factor"] > 1 else 1.0

    factor = scale(1.0)
    if "mscale" in given and "mscale_all_dim" in given:
        factor = scale(given["mscale"]) / scale(given["mscale_all_dim"])
    fast, slow = given.get("beta_fast", 32.0), given.get("beta_slow", 1.0)
    return Yarn(fast, slow, truncate, given.get("attention_factor", factor))


def _rope_type(fields: Mapping[str, Any]) -> str:
    return str(fields.get("rope_type") or fields.get("type") or "default")

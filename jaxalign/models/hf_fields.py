"""Fields of a Hugging Face `config.json`, read with the checks that every family needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.errors import InputError
from jaxalign.models.hf_rope import rope
from jaxalign.models.hf_values import FULL, SLIDING, flag, integer, number, shown, wrong

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
    use_bfloat16 use_cache use_return_dict classifier_dropout token_classification_bias
"""  # pretraining_tp splits matmuls into parts that are summed: the same mathematics
_BOOKKEEPING = frozenset(_BOOKKEEPING_NAMES.split())


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
    hf: Mapping[str, Any],
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    rope_theta: float = 10_000.0,
    turned: float = 1.0,
) -> dict[str, Any]:
    """The fields of `ModelConfig` that every decoder with rotary positions and gated mlps has; no biases.

    Args:
      hf: the parsed `config.json`.
      num_kv_heads: where the file does not say; None: as many as query heads.
      head_dim: where the file does not say; None: what the hidden size gives each query head.
      norm_eps: where the file does not say.
      rope_theta: where the file does not say.
      turned: the share of a head's dims that turns by position.

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
        "rope": rope(hf, head_dim, turned=turned, default_theta=rope_theta),
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
    types = layer_types(hf, lambda layer: window is not None and slides(layer))
    if window is None and SLIDING in types:
        raise wrong("layer_types", types, f"{FULL!r} alone, where sliding_window is not set or not used")
    found = tuple(window if kind == SLIDING else None for kind in types)
    return found if any(found) else None


def layer_types(hf: Mapping[str, Any], slides: Callable[[int], bool]) -> list[str]:
    """`layer_types`, or where there are none, `SLIDING` for those that `slides` says.

    Raises:
      InputError: types that are not one of each layer, or not known.
    """
    layers, types = integer(hf, "num_hidden_layers"), hf.get("layer_types")
    if types is None:
        return [SLIDING if slides(i) else FULL for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= {FULL, SLIDING}:
        raise wrong("layer_types", types, f"{layers} of {FULL!r} and {SLIDING!r}")
    return types


def window_of(hf: Mapping[str, Any], default: int | None) -> int | None:
    """`sliding_window`, how many positions back a token sees, its own among them; None where it is null.

    Args:
      hf: the parsed `config.json`.
      default: where the file does not say.
    """
    return None if hf.get("sliding_window", default) is None else integer(hf, "sliding_window", default)

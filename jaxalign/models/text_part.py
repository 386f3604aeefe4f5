"""The text model of a checkpoint that also holds an encoder of images: its fields of `config.json`, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from jaxalign.errors import InputError
from jaxalign.models.families import FAMILIES
from jaxalign.models.hf_values import shown, wrong

# What such a file says of images alone.
_IMAGE_NAMES = """
    text_config vision_config image_token_index image_token_id boi_token_index eoi_token_index mm_tokens_per_image
    multimodal_projector_bias projector_hidden_act spatial_merge_size vision_feature_layer
"""
_IMAGE_FIELDS = frozenset(_IMAGE_NAMES.split())

# The parts of a checkpoint, in the two forms that there are: as files have been since the first, and as transformers 5
# names its modules. First match wins; None: what is left unread.
_PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("vision_tower.", None),
    ("multi_modal_projector.", None),
    ("model.vision_tower.", None),
    ("model.multi_modal_projector.", None),
)
_TEXT = ("language_model.", "model.language_model.")

T = TypeVar("T")


def text_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` as that of the text model alone; what it says of both parts is the text's where that is silent.

    Args:
      hf: the parsed file; of a text model it is returned as it is.

    Raises:
      InputError: a text model of another kind, or none.
    """
    kind = str(hf.get("model_type"))
    families = [family for family in FAMILIES if kind in family.inside]
    if not families:
        return dict(hf)
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise wrong("text_config", text, "an object: the fields of the text model")
    named = text.get("model_type", families[0].model_types[0])
    family = next((family for family in families if named in family.model_types), None)
    if family is None:
        known = " or ".join(repr(name) for family in families for name in family.model_types)
        raise wrong("text_config.model_type", named, known)
    whole = hf.get("architectures") or [family.inside[kind]]
    if whole != [family.inside[kind]]:
        raise InputError(
            f"architectures {shown(whole)} in config.json, of {kind!r}",
            f"{family.inside[kind]}, whose text model is read",
            "--config.model.path=such a checkpoint",
        )
    both = {name: value for name, value in hf.items() if name not in _IMAGE_FIELDS}
    return both | dict(text) | {"model_type": named, "architectures": [family.architectures["lm"]]}


def text_tensors(tensors: Mapping[str, T]) -> Mapping[str, T]:
    """The tensors of the text model by the names that it has alone; of a text model they are returned as they are.

    Args:
      tensors: of a checkpoint, by name. Tensors of the encoder are left out, others keep their names.

    Raises:
      InputError: one tensor in both forms.
    """
    if not any(name.startswith(_TEXT) for name in tensors):
        return tensors
    found: dict[str, T] = {}
    for name, tensor in tensors.items():
        before, after = next((rule for rule in _PREFIXES if name.startswith(rule[0])), ("", ""))
        if after is None:
            continue
        alone = after + name.removeprefix(before)
        if alone in found:
            raise InputError(f"{name} and another {alone}", "each tensor of the text model once", "download it again")
        found[alone] = tensor
    return found

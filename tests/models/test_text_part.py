"""The text model of a checkpoint with an encoder of images: what is read of it, and what is refused."""

import jax
import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.models.config import from_hf
from jaxalign.models.text_part import text_fields
from jaxalign.models.tokenizer import stop_ids
from jaxalign.models.weights import list_tensors
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES, FORMS, WITH_IMAGES

_PARTS = ("vision_tower.", "multi_modal_projector.")
IMAGES = {"old": _PARTS, "new": tuple(f"model.{part}" for part in _PARTS)}
NONE = np.zeros((3, 5), np.float16)  # of the encoder, which is not looked at


def written(directory, case, form, without=(), **more):
    config = WITH_IMAGES[case]
    tensors = {FORMS[form](name): value for name, value in tiny.tensors(config).items()}
    tensors |= {prefix + "weight": NONE for prefix in IMAGES[form]} | more
    return tiny.write(directory, config, {name: value for name, value in tensors.items() if name not in without})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", WITH_IMAGES)
def test_it_is_the_model_that_the_text_alone_would_be(tmp_path, case, form):
    """In both forms of tensors' names; an export is of the text model, with its tensors bit for bit."""
    model, params = hf.load(written(tmp_path / "images", case, form), **tiny.SETTINGS)
    tiny.write(tmp_path / "text", CASES[case], tiny.tensors(CASES[case]))
    alone, same = hf.load(tmp_path / "text", **tiny.SETTINGS)
    assert model == alone
    jax.tree.map(np.testing.assert_array_equal, params, same)
    hf.save(tmp_path / "out", model, params, source=tmp_path / "images")
    assert hf.load(tmp_path / "out", **tiny.SETTINGS)[0] == alone
    out, text = list_tensors(tmp_path / "out"), list_tensors(tmp_path / "text")
    assert out.keys() == text.keys()
    for name, tensor in out.items():
        np.testing.assert_array_equal(tensor.read(), text[name].read())
    exported = hf.read_config(tmp_path / "out", **tiny.SETTINGS).hf
    assert exported["architectures"] == CASES[case]["architectures"]
    assert exported["model_type"] == CASES[case]["model_type"]
    assert not {"text_config", "vision_config", "image_token_index"} & exported.keys()


def test_what_a_file_says_of_both_parts_is_the_texts():
    both = WITH_IMAGES["gemma3"] | {"eos_token_id": [2, 7], "initializer_range": 0.5}
    text = text_fields(both)
    assert text["eos_token_id"] == [2, 7] and text["initializer_range"] == 0.02
    assert text_fields(text) == text
    with pytest.raises(InputError, match="quantization_config 'fp8'"):
        from_hf(both | {"quantization_config": {"quant_method": "fp8"}}, **tiny.SETTINGS)
    with pytest.raises(InputError, match="use_deep_prompts"):
        from_hf(both | {"use_deep_prompts": True}, **tiny.SETTINGS)


def test_stop_ids_are_found_in_the_texts_fields(tmp_path):
    class Tokenizer:
        eos_token_id = 1

    config = WITH_IMAGES["gemma3"] | {"eos_token_id": None}
    tiny.write(tmp_path, config | {"text_config": config["text_config"] | {"eos_token_id": [2, 5]}}, {})
    assert stop_ids(tmp_path, Tokenizer) == (1, 2, 5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text_config": None}, "text_config"),
        ({"text_config": {"model_type": "qwen2"}}, "'qwen2'"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "Gemma3ForSequenceClassification"),
        ({"model_type": "gemma3n"}, "images"),
    ],
)
def test_another_text_model_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        from_hf(WITH_IMAGES["gemma3"] | changes, **tiny.SETTINGS)


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_of_the_text_is_asked_for(tmp_path, form):
    name = "model.layers.1.mlp.up_proj.weight"
    written(tmp_path / "less", "gemma3", form, without=(FORMS[form](name),))
    with pytest.raises(InputError, match=f"no {name}"):
        hf.load(tmp_path / "less", **tiny.SETTINGS)
    written(tmp_path / "more", "gemma3", form, **{FORMS[form]("model.layers.1.mlp.other.weight"): NONE})
    with pytest.raises(InputError, match=r"mlp\.other"):
        hf.load(tmp_path / "more", **tiny.SETTINGS)
    written(tmp_path / "twice", "gemma3", form, **{f(name): NONE for f in FORMS.values()})
    with pytest.raises(InputError, match=f"another {name}"):
        hf.load(tmp_path / "twice", **tiny.SETTINGS)


def test_a_text_model_with_an_encoders_tensors_is_refused(tmp_path):
    """They are left unread only beside tensors that say where they come from."""
    tensors = tiny.tensors(CASES["gemma3"]) | {"vision_tower.weight": NONE}
    with pytest.raises(InputError, match="vision_tower"):
        hf.load(tiny.write(tmp_path, CASES["gemma3"], tensors), **tiny.SETTINGS)

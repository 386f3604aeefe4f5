"""What an export says to older readers: the class of its tokenizer, its rope."""

import json
import shutil

import jax
import pytest

from jaxalign.models import hf
from jaxalign.models.config import from_hf
from jaxalign.models.tokenizer import load_tokenizer
from tests.models import tiny_models as tiny

TEXTS = ("Once upon\n  there", " déjà vu 🦊", "a</s>b <|endoftext|>c <|im_end|>d", "")


@pytest.mark.parametrize("name", [None, *tiny.VARIANTS])
def test_trap_rope_is_written_in_both_forms(tmp_path, name):
    """Read without `rope_parameters`, as transformers 4 does, an export is the same model."""
    config = tiny.hf_config(**(tiny.VARIANTS[name] if name else {"rope_parameters": {"rope_theta": 5e4}}))
    source = tiny.write(tmp_path / "in", config, tiny.tensors(config))
    model, params = hf.load(source, **tiny.SETTINGS)
    written = json.loads((hf.save(tmp_path / "out", model, params) / "config.json").read_text())
    assert from_hf(written, **tiny.SETTINGS) == model.config
    del written["rope_parameters"]
    assert from_hf(written, **tiny.SETTINGS) == model.config


def test_the_older_form_stays_as_it_is(tmp_path):
    config = tiny.hf_config(rope_theta=5e4)
    del config["rope_parameters"]
    model, params = hf.load(tiny.write(tmp_path / "in", config, tiny.tensors(config)), **tiny.SETTINGS)
    written = json.loads((hf.save(tmp_path / "out", model, params) / "config.json").read_text())
    assert written["rope_theta"] == 5e4 and "rope_parameters" not in written


NAMES = ("qwen2-rebuilt", "llama2-spm", "mistral-v3-spm", "gpt2", "gpt-neox-20b", "minimind-6400")


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_have_a_class_that_transformers_4_has(shared, tmp_path, name):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    config = tiny.hf_config()
    model, params = hf.load(tiny.write(tmp_path / "in", config, tiny.tensors(config)), **tiny.SETTINGS)
    out = hf.save(tmp_path / "out", model, params, tokenizer=tokenizer)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)  # transformers 4 asks it for `keys`
    again = load_tokenizer(out)
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids
    assert (
        set(again.all_special_ids) == set(tokenizer.all_special_ids) and again.chat_template == tokenizer.chat_template
    )


def test_special_tokens_keep_their_places(shared, tmp_path):
    """Also where an export of transformers 5 is copied, without having been loaded."""
    tokenizer = load_tokenizer(shared / "tokenizers" / "minimind-6400")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|think|>"]})
    tokenizer.save_pretrained(tmp_path / "new")
    config = tiny.hf_config()
    source = tiny.write(tmp_path / "in", config, tiny.tensors(config))
    model, params = hf.load(source, **tiny.SETTINGS)
    for file in (tmp_path / "new").iterdir():
        shutil.copyfile(file, source / file.name)
    for directory, options in (("saved", {"tokenizer": tokenizer}), ("copied", {"source": source})):
        out = hf.save(tmp_path / directory, model, jax.tree.map(lambda x: x, params), **options)
        settings = json.loads((out / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert settings["additional_special_tokens"] == ["<|think|>"] and "extra_special_tokens" not in settings
        again = load_tokenizer(out)
        assert set(again.all_special_ids) == set(tokenizer.all_special_ids)
        assert again("a <|think|>").input_ids == tokenizer("a <|think|>").input_ids

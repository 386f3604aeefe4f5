"""Tokenizers: real ones, their padding and stop tokens, and clear errors."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from jaxalign.errors import InputError
from jaxalign.models.tokenizer import check_vocabulary, load_tokenizer, stop_ids


@pytest.mark.parametrize(
    "name, pad, stops",
    [
        ("models/stories3m-llama", 0, (1, 2)),
        ("tokenizers/minimind-6400", 0, (2,)),
        ("tokenizers/gpt2", 50256, (50256,)),
        ("tokenizers/gpt-neox-20b", 1, (0,)),
    ],
)
def test_real_tokenizers(shared, name, pad, stops):
    tokenizer = load_tokenizer(shared / name)
    assert tokenizer.pad_token_id == pad
    assert stop_ids(shared / name, tokenizer) == stops
    text = "Once upon a time, there was a café.\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    check_vocabulary(tokenizer, max(tokenizer.get_vocab().values()) + 1)
    with pytest.raises(InputError, match="vocabulary 100"):
        check_vocabulary(tokenizer, 100)


@pytest.mark.parametrize("name", ["llama2-spm", "mistral-v3-spm"])
def test_sentencepiece_alone(shared, tmp_path, name):
    """The tokens are sentencepiece's own (transformers 5.23 makes others after a newline), BOS first, text restored."""
    import sentencepiece

    file = shared / "tokenizers" / name / "tokenizer.model"
    shutil.copyfile(file, tmp_path / "tokenizer.model")
    config = {"chat_template": "{{ x }}", "bos_token": {"content": "<s>"}, "add_bos_token": False}
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("One day,\n  two   cats", "x = {'a': 1}\n\n\tprint(x)", "Grüße 你好 🙂", "   ", "a"):
        ids = tokenizer(text).input_ids
        assert ids == [reference.bos_id(), *reference.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template) == (2, 0, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("a").input_ids == reference.encode("a")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again("One day,\n  two").input_ids == reference.encode("One day,\n  two")
    assert again.chat_template == "{{ x }}"
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_stop_ids_of_every_source(shared, tmp_path):
    """Several stop ids: the generation config's list, the config's and the tokenizer's own."""
    tokenizer = load_tokenizer(shared / "models" / "stories260k-llama")
    assert stop_ids({"eos_token_id": [7, 5]}, tokenizer) == (2, 5, 7)
    assert stop_ids({"eos_token_id": 9}, tokenizer) == (2, 9)
    assert stop_ids({}, tokenizer) == (2,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 3]}))
    assert stop_ids(tmp_path, tokenizer) == (2, 3, 4)
    tokenizer.eos_token = None
    assert stop_ids({}, tokenizer) == ()


def test_a_configuration_that_transformers_refuses_is_not_the_tokenizers_fault(shared, tmp_path):
    source = shared / "models" / "stories3m-llama"
    shutil.copyfile(source / "tokenizer.json", tmp_path / "tokenizer.json")
    file = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(file | {"hidden_size": 193, "head_dim": 32}))
    with pytest.raises(InputError, match="193") as error:
        load_tokenizer(tmp_path)
    assert "config.json" in error.value.found and "tokenizer" not in error.value.fix
    (tmp_path / "config.json").write_text(json.dumps(file))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="the tokenizer in"):
        load_tokenizer(tmp_path)


def test_chat_template(shared, tmp_path):
    source = shared / "models" / "stories260k-llama"
    assert load_tokenizer(source).chat_template is None
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    assert load_tokenizer(source, chat_template=str(file)).chat_template == "{{ messages }}"
    assert load_tokenizer(source, chat_template="{{ x }}").chat_template == "{{ x }}"
    with pytest.raises(InputError, match=r"absent\.jinja"):
        load_tokenizer(source, chat_template="absent.jinja")
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    for good in (strict, "{{ messages[7].content }}", "{% generation %}x{% endgeneration %}"):
        assert load_tokenizer(source, chat_template=good).chat_template == good


@pytest.mark.parametrize("text", ["{% for m in messages %}", "{{ x | no_such_filter }}", "{% frob %}", "{{ a b }}"])
def test_a_template_that_can_never_render_is_told_at_once(shared, tmp_path, text):
    source = shared / "models" / "stories260k-llama"
    file = tmp_path / "chat.jinja"
    file.write_text(f"ok\n{text}")
    for given in (str(file), f"ok\n{text}"):
        with pytest.raises(InputError, match="chat_template: line 2 of"):
            load_tokenizer(source, chat_template=given)
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="UTF-8"):
        load_tokenizer(source, chat_template=str(file))
    with pytest.raises(InputError, match="chat_template"):
        load_tokenizer(source, chat_template="a" * 5000)


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{% mystery %}", "{{ messages", " ", b"{{ \xff }}"])
def test_a_template_that_cannot_be_read_is_refused_before_a_record_needs_it(shared, tmp_path, template):
    file = tmp_path / "chat.jinja"
    file.write_bytes(template if isinstance(template, bytes) else template.encode())
    with pytest.raises(InputError, match=r"chat_template.*chat\.jinja"):
        load_tokenizer(shared / "models" / "stories260k-llama", chat_template=str(file))


def test_a_template_may_use_what_transformers_adds_to_jinja(shared):
    marked = "{% for m in messages %}{%- generation -%}{{ m.content }}{% break %}{% endgeneration %}{% endfor %}"
    assert load_tokenizer(shared / "models" / "stories260k-llama", chat_template=marked).chat_template == marked


@pytest.mark.parametrize("field, value", [("chat_template", 3), ("model_max_length", "x"), (None, b"{"), (None, b"[]")])
def test_settings_that_cannot_be_are_named_with_their_file(shared, tmp_path, field, value):
    for file in (shared / "models" / "stories260k-llama").iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    settings = tmp_path / "tokenizer_config.json"
    text = value if field is None else json.dumps(json.loads(settings.read_text()) | {field: value}).encode()
    settings.write_bytes(text)
    with pytest.raises(InputError) as refused:
        load_tokenizer(tmp_path)
    assert str(settings) in refused.value.found and (field or "JSON") in str(refused.value)


def test_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_trap_pad_is_not_eos(shared, tmp_path):
    """TRAPS.md, pad token = EOS token: another id is taken where there is one."""
    for file in (shared / "models" / "stories260k-llama").iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "</s>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_id == 2 and tokenizer.pad_token_id == 0


def test_loading_says_nothing_of_an_absent_pytorch(shared):
    code = "import sys; from jaxalign.models.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])"
    env = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(shared / "models" / "stories260k-llama")],
        env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "PyTorch" not in done.stderr

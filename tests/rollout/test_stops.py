"""Several stop tokens of a generation config: each ends an answer, and none that is a marker is in its text."""

import io
import json
import shutil

import pytest
from transformers import AddedToken

from jaxalign.cli import main
from jaxalign.pipeline.chat import chat
from jaxalign.pipeline.loaded import load_model
from jaxalign.rollout.engine import Generator, end_markers
from jaxalign.rollout.sampling import Sampling

PROMPT = "Once upon a time"
GREEDY = Sampling(0.0, 16)

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def one_device(monkeypatch):
    import jax

    import jaxalign.pipeline.loaded as loaded

    make_mesh = loaded.make_mesh
    monkeypatch.setattr(loaded, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1]))


@pytest.fixture(scope="module")
def model(request):
    return request.getfixturevalue("shared") / "models" / "stories260k-llama"


@pytest.fixture
def greedy(model):
    """Token ids that the model writes by itself."""
    return load_model(str(model), head="lm").generator(GREEDY)([PROMPT], seed=0)[0].ids


def ending_at(model, folder, *ends):
    """The model with further stop tokens in its generation config."""
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *ends]}))
    return str(folder)


def test_each_of_several_stop_tokens_ends_an_answer(model, greedy, tmp_path, capsys):
    for place in (3, 8):
        loaded = load_model(ending_at(model, tmp_path / str(place), 2, greedy[place], 400), head="lm")
        first = greedy.index(greedy[place])
        (one,) = loaded.generator(GREEDY)([PROMPT], seed=0)
        assert set(loaded.stop_ids) >= {2, greedy[place], 400}
        assert (one.ids, one.finished) == (greedy[: first + 1], True)
    flags = ["--prompt", PROMPT, "--temperature=0", "--max_new_tokens=16"]
    assert main(["generate", "--model", str(tmp_path / "8"), *flags]) == 0
    assert capsys.readouterr().out == one.text + "\n"


@pytest.mark.parametrize("special", [True, False])
def test_a_marker_at_the_end_is_no_text_whatever_the_tokenizer_calls_it(model, greedy, special):
    loaded = load_model(str(model), head="lm")
    tokenizer, end = loaded.tokenizer, greedy[8]
    before = tokenizer.decode(greedy[: greedy.index(end)])
    made = {"stop_ids": (2, end), "sampling": GREEDY, "mesh": loaded.mesh}
    word = Generator(loaded.model, loaded.params, tokenizer, **made).continue_ids(
        [tokenizer(PROMPT)["input_ids"]], seed=0
    )[0]
    assert word.text == tokenizer.decode(word.ids) != before, "a word at which it stops is text"
    tokenizer.add_tokens(
        [AddedToken(tokenizer.convert_ids_to_tokens(end), special=special, normalized=False)], special_tokens=special
    )
    assert end_markers(tokenizer, (2, end, 7)) == {2, end}
    marker = Generator(loaded.model, loaded.params, tokenizer, **made).continue_ids(
        [tokenizer(PROMPT)["input_ids"]], seed=0
    )[0]
    assert (marker.ids, marker.finished) == (word.ids, True)
    assert marker.text == tokenizer.decode(word.ids[:-1], skip_special_tokens=True)


def test_a_dialogue_goes_on_after_a_second_stop_token(model, tmp_path, monkeypatch):
    """The turn's marker is neither shown nor part of what the model reads as the turn's words."""
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    read = []
    encode = Generator.encode
    monkeypatch.setattr(Generator, "encode", lambda self, prompts: read.append(prompts[0]) or encode(self, prompts))
    chat(str(folder), GREEDY, seed=0, lines=["Hi"], out=io.StringIO())
    loaded = load_model(str(folder), head="lm")
    ids = loaded.generator(GREEDY).continue_ids(encode(loaded.generator(GREEDY), read[0:1]), seed=0)[0].ids
    end = ids[6]
    first = ids.index(end)
    config = json.loads((folder / "tokenizer.json").read_text())
    content = loaded.tokenizer.convert_ids_to_tokens(end)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    config["added_tokens"].append({"id": end, "content": content, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    said = io.StringIO()
    read.clear()
    chat(str(folder), GREEDY, seed=0, lines=["Hi", "And?"], out=said)
    want = loaded.tokenizer.decode(ids[:first], skip_special_tokens=True).strip()
    assert said.getvalue().splitlines()[0] == want
    assert read[-1][1] == {"role": "assistant", "content": want}

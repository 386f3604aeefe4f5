"""`jaxalign chat`: a dialogue from lines."""

import io

import pytest

from jaxalign.cli import main
from jaxalign.pipeline.chat import chat
from jaxalign.pipeline.loaded import load_model
from jaxalign.rollout.engine import Generator
from jaxalign.rollout.sampling import Sampling
from jaxalign.rollout.slots import advance, prefill
from tests.cli.cases import make_reward, with_context

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def model(request):
    return request.getfixturevalue("shared") / "models" / "stories260k-llama"


def talked(monkeypatch, capsys, model, text, *flags):
    """(answers, what is said beside them) of lines piped in."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["chat", "--model", str(model), "--temperature=0", "--max_new_tokens=8", *flags]) == 0
    out, err = capsys.readouterr()
    return out, err


def test_the_model_reads_the_dialogue_and_reset_forgets_it(model, monkeypatch, capsys):
    lines = "Tell me of a dog.\n\nAnd of a cat?\n/reset\nTell me of a dog.\n/quit\nnobody reads this\n"
    out, err = talked(monkeypatch, capsys, model, lines)
    assert "no chat template" in err and "a new dialogue" in err
    single, _ = talked(monkeypatch, capsys, model, "Tell me of a dog.\n")
    first, second = talked(monkeypatch, capsys, model, "Tell me of a dog.\nAnd of a cat?\n")[0], single
    assert out == first + second and first.startswith(single)


def test_a_dialogue_that_outgrows_the_model_loses_its_oldest_turns(model, tmp_path, monkeypatch, capsys):
    small = with_context(model, tmp_path / "small", 96)
    _, err = talked(monkeypatch, capsys, small, "Tell me of a dog.\n" * 4)
    assert "oldest turns" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 200))
    assert main(["chat", "--model", small]) == 2
    assert "shorter message" in capsys.readouterr().err


def test_wrong_models_are_told_in_words(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", "--model", "/no/such"]) == 2
    assert "no directory" in capsys.readouterr().err
    assert main(["chat", "--model", make_reward(model, tmp_path / "rm")]) == 2
    assert "reward model" in capsys.readouterr().err


MESSAGES = ["Tell me of a dog.", "And of a cat?", "Who is the bird?"]


class Pieces(io.StringIO):
    """What is written, piece by piece; a Ctrl-C comes with the piece of the given number."""

    def __init__(self, interrupted=None):
        super().__init__()
        self.pieces, self.interrupted = [], interrupted

    def write(self, text):
        self.pieces.append(text)
        super().write(text)
        if len(self.pieces) == self.interrupted:
            raise KeyboardInterrupt
        return len(text)


def answers(model, messages, interrupted=None):
    """(pieces, lines) of a dialogue, of which each message gets at most 24 tokens."""
    out = Pieces(interrupted)
    chat(str(model), Sampling(0.0, 24), seed=0, lines=messages, out=out)
    return out.pieces, out.getvalue().splitlines()


@pytest.fixture(scope="module")
def whole(model):
    """What the model says to a dialogue of user, assistant, user, ... messages, all at once."""
    made = load_model(str(model), head="lm").generator(Sampling(0.0, 24))

    def say(*said):
        roles = ("user", "assistant")
        (answer,) = made([[{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]], seed=0)
        return answer.text.strip()

    return say


def test_an_answer_is_written_as_it_is_decoded(model, whole):
    pieces, _ = answers(model, MESSAGES[:1])
    assert "".join(pieces) == whole(MESSAGES[0]) + "\n"
    assert len([p for p in pieces if p.strip()]) > 3


def test_an_interrupted_answer_stays_in_the_dialogue(model, whole):
    _, (first, second) = answers(model, MESSAGES[:2], interrupted=3)
    all_of_it = whole(MESSAGES[0])
    assert first and all_of_it.startswith(first) and len(first) < len(all_of_it)
    assert second == whole(MESSAGES[0], first, MESSAGES[1])


def test_a_message_without_a_word_of_an_answer_is_forgotten(model, whole, monkeypatch):
    def once(*args, **options):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "continue_ids", once)
    assert answers(model, MESSAGES[:2])[1] == ["", whole(MESSAGES[1])]


def test_a_dialogue_that_grows_compiles_once(model):
    programs = []

    def messages():
        for message in MESSAGES:
            yield message
            programs.append(prefill._cache_size() + advance._cache_size())

    answers(model, messages())
    assert len(programs) == 3 and len(set(programs)) == 1

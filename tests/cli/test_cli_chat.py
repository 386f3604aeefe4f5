"""`jaxalign chat`: a dialogue from lines."""

import io

import pytest

from jaxalign.cli import main
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

"""`jaxalign logprobs` and `jaxalign score` on a shared model, against values that transformers gave."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxalign.cli import main
from tests.cli.cases import LINES, make_reward, run, with_context, write_lines

pytestmark = pytest.mark.usefixtures("one_device")

GOLDEN = json.loads((Path(__file__).resolve().parent.parent / "golden" / "cli_logprobs.json").read_text())


@pytest.fixture(scope="module")
def model(request):
    return str(request.getfixturevalue("shared") / "models" / "stories260k-llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("lines") / "d.jsonl")


def test_logprobs(model, data):
    golden = GOLDEN["stories260k-llama"]
    ours = run("logprobs", "--model", model, "--data", data)
    assert [line["num_tokens"] for line in ours] == golden["counts"]
    np.testing.assert_allclose([line["sum_logprob"] for line in ours], golden["sums"], rtol=1e-5, atol=1e-4)
    assert set(ours[0]) == {"sum_logprob", "num_tokens"}


def test_trap_tokens_are_those_of_training(model, shared, tmp_path):
    """TRAPS.md, prompt boundary: one text, the prompt's tokens end at or before its end."""
    from jaxalign.data.records import Record
    from jaxalign.data.tokenize import Encoder, tokenize_records
    from jaxalign.models.tokenizer import load_tokenizer
    from jaxalign.pipeline.loaded import tokenize

    lines = [*LINES, ("Once upon", "a time"), ("Once upon a ti", "me."), ("The cat ", " sat"), ("<s>One", " day")]
    lines = [line for line in lines if line[1]]
    for path in (model, shared / "models" / "stories3m-llama", shared / "tokenizers" / "gpt2"):
        tokenizer = load_tokenizer(path)
        records = [Record(i, "d", i + 1, "completion", prompt=p, completion=c) for i, (p, c) in enumerate(lines)]
        trained = list(tokenize_records(records, Encoder(tokenizer), append_eos=False))
        found = tokenize(tokenizer, lines, [""] * len(lines))
        for one, other in zip(found, trained, strict=True):
            assert list(one.prompt) == other.prompt.tolist()
            assert list(one.completion)[: len(other.completions[0])] == other.completions[0].tolist()


def test_a_likely_text_is_likely_and_apart_it_is_not(shared, tmp_path):
    big = str(shared / "models" / "stories3m-llama")
    data = write_lines(tmp_path / "d.jsonl", [("Once upon a time", ", there was a cat.")])
    (joint,), (apart,) = (run("logprobs", "--model", big, "--data", data, *flag) for flag in ((), ("--separate",)))
    assert joint["sum_logprob"] > -12 > -25 > apart["sum_logprob"]


def test_trap_eos_counts_only_where_the_completion_holds_it(model, tmp_path):
    lines = [("The end", "."), ("The end", ".</s>")]
    without, with_eos = run("logprobs", "--model", model, "--data", write_lines(tmp_path / "d.jsonl", lines))
    assert with_eos["num_tokens"] == without["num_tokens"] + 1
    assert with_eos["sum_logprob"] < without["sum_logprob"]


def test_trap_one_bos_at_the_start(model, tmp_path):
    lines = [("Once upon", " a time"), ("<s>Once upon", " a time"), ("<s><s>Once upon", " a time")]
    plain, own, two = run("logprobs", "--model", model, "--data", write_lines(tmp_path / "d.jsonl", lines))
    # The word behind a special token has no space of its own in front; the second start changes nothing.
    assert own == two and own["num_tokens"] == plain["num_tokens"]
    from jaxalign.models.tokenizer import load_tokenizer
    from jaxalign.pipeline.loaded import tokenize

    tokenizer = load_tokenizer(model)
    for sequence in tokenize(tokenizer, lines, ["", "", ""]):
        assert list(sequence.prompt).count(tokenizer.bos_token_id) == 1


def test_scores(shared, data, tmp_path, capsys):
    reward = make_reward(shared / "models" / "stories260k-llama", tmp_path / "reward")
    ours = run("score", "--model", reward, "--data", data)
    np.testing.assert_allclose([line["score"] for line in ours], GOLDEN["scores"], rtol=1e-4, atol=1e-5)
    assert main(["logprobs", "--model", reward, "--data", data]) == 2
    assert "is a reward model" in capsys.readouterr().err


def test_implicit_reward_of_the_reference_itself_is_zero(model, data):
    ours = run("score", "--model", model, "--ref", model, "--beta", "0.1", "--data", data)
    assert [line["score"] for line in ours] == [0.0] * len(LINES)


def test_a_language_model_has_no_score(model, data, capsys):
    assert main(["score", "--model", model, "--data", data]) == 2
    assert "--ref DIR --beta" in capsys.readouterr().err


def test_longer_than_the_context_is_said(model, tmp_path, capsys):
    short = with_context(Path(model), tmp_path / "short", 10)
    data = write_lines(tmp_path / "d.jsonl", [("Once", " upon"), ("a b c d e f g h i j k l", "end")])
    assert len(run("logprobs", "--model", short, "--data", data)) == 2
    err = capsys.readouterr().err
    assert "d.jsonl:2: longer than the 10 tokens" in err


@pytest.mark.parametrize(
    "text,words",
    [
        ("", "holds no lines"),
        ("\n \n", "holds no lines"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "d.jsonl:2: no 'completion'"),
        ('{"completion": "a"}\n', "d.jsonl:1: no 'prompt'"),
        ('{"prompt": "a", "completion": 3}\n', "d.jsonl:1: 'completion' is int"),
        ('{"prompt": "a", "completion": "\\ud83d"}\n', "d.jsonl:1: 'completion' holds half a surrogate pair"),
        ('{"prompt": null, "completion": "b"}\n', "d.jsonl:1: 'prompt' is NoneType"),
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": \n', "d.jsonl:3"),
        ("[1]\n", "d.jsonl:1"),
        ('{"prompt": [{"role": "user", "content": "x"}], "completion": "b"}\n', "'prompt' is list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, capsys, text, words):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    assert main(["logprobs", "--model", "never-loaded", "--data", str(path)]) == 2
    assert words in capsys.readouterr().err


def test_blank_lines_and_byte_order_marks(model, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes('\ufeff{"prompt": "a", "completion": "b"}\r\n\r\n{"prompt": "a", "completion": "b"}'.encode())
    first, second = run("logprobs", "--model", model, "--data", str(path))
    assert first == second


def test_two_tokenizers_are_refused(model, shared, data, capsys):
    other = str(shared / "models" / "stories3m-llama")
    assert main(["score", "--model", model, "--ref", other, "--beta", "0.1", "--data", data]) == 2
    assert "give different tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (("logprobs", "--model", "/nope"), "--model"),
        (("score", "--model", "/nope"), "--model"),
        (("score", "--model", "MODEL", "--ref", "/nope", "--beta", "0.1"), "--ref"),
    ],
)
def test_the_flag_of_a_missing_model_is_named(model, data, capsys, argv, flag):
    assert main([model if a == "MODEL" else a for a in argv] + ["--data", data]) == 2
    assert f"fix:      {flag} DIR, in place of /nope\n" in capsys.readouterr().err

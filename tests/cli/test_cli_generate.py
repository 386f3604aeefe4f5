"""`jaxalign generate` and `jaxalign compare` on a shared model."""

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from jaxalign.cli import main
from jaxalign.config import defaults
from jaxalign.pipeline.compare import _ROWS, page
from jaxalign.pipeline.generate import generate as continue_prompt
from jaxalign.rollout.sampling import Sampling
from tests.cli.cases import make_reward, with_context

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def model(request):
    return request.getfixturevalue("shared") / "models" / "stories260k-llama"


def generate(capsys, model, prompt, *flags):
    assert main(["generate", "--model", str(model), "--prompt", prompt, *flags]) == 0
    return capsys.readouterr().out


def test_greedy_text_is_the_models_published_sample(model, capsys):
    sample = re.search(r"\[greedy\][^\n]*\n(.*?)(?:\n\[|\Z)", (model / "samples.txt").read_text(), re.DOTALL)[1]
    assert sample.startswith("Once upon a time")
    out = generate(capsys, model, "Once upon a time", "--temperature", "0", "--max_new_tokens", "24")
    assert len(out) > 20
    assert sample.startswith("Once upon a time" + out.removesuffix("\n"))  # the completion and nothing else


def test_samples_come_from_the_seed(model, capsys):
    flags = ("--max_new_tokens", "24", "--seed")
    one = generate(capsys, model, "The dog", *flags, "1")
    assert one == generate(capsys, model, "The dog", *flags, "1") != generate(capsys, model, "The dog", *flags, "2")
    assert one.startswith(" ")  # prompt + completion is the whole text


def test_top_k_of_one_is_greedy(model, capsys):
    greedy = generate(capsys, model, "Once upon a time", "--temperature", "0", "--max_new_tokens", "24")
    assert greedy == generate(capsys, model, "Once upon a time", "--top_k", "1", "--max_new_tokens", "24")


def test_a_model_without_a_chat_template_is_asked_plainly(model, capsys):
    flags = ("--temperature", "0", "--max_new_tokens", "12")
    assert main(["generate", "--model", str(model), "--prompt", "Hi", "--chat", *flags]) == 0
    said = capsys.readouterr()
    assert "has no chat template: the prompt is written as plain text" in said.err
    plain = generate(capsys, model, "\n\nHuman: Hi\n\nAssistant:", *flags)
    assert said.out.strip() == plain.strip()


@pytest.mark.parametrize(
    ("flag", "fix"), [("--data=x", "jaxalign generate --help"), ("--promt=x", "--prompt"), ("--top-k=1", "--top_k")]
)
def test_a_flag_that_is_not_there_is_told_before_what_is_missing(model, capsys, flag, fix):
    assert main(["generate", "--model", str(model), flag]) == 2
    told = capsys.readouterr().err
    assert f"{flag.partition('=')[0]}: there is no such flag" in told and told.strip().endswith(f"fix:      {fix}")


def test_longer_than_the_context_is_said(model, tmp_path, capsys):
    short = with_context(model, tmp_path / "short", 20)
    flags = ("--temperature", "0", "--max_new_tokens", "24")
    assert main(["generate", "--model", short, "--prompt", "Once upon a time", *flags]) == 0
    said = capsys.readouterr().err
    assert "--max_new_tokens 24: longer than the 20 tokens" in said
    assert int(re.search(r"--max_new_tokens (\d+) stays within", said)[1]) < 20


def test_the_default_length_is_what_the_model_has_room_for(model, tmp_path, capsys):
    short = with_context(model, tmp_path / "short", 20)
    usual = Sampling.of(defaults("ppo").rollout, temperature=0)
    tokens = AutoTokenizer.from_pretrained(short)
    room = 20 - len(tokens("Once upon a time")["input_ids"])
    text = continue_prompt(short, "Once upon a time", usual, seed=0, within_room=True)
    assert text == continue_prompt(short, "Once upon a time", usual._replace(max_new_tokens=room), seed=0)
    assert capsys.readouterr().err == ""
    long = "Once upon a time there was a cat. " * 4
    continue_prompt(short, long, usual, seed=0, within_room=True)
    assert "longer than the 20 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [("--temperature", "-1"), ("--max_new_tokens", "0"), ("--top_k", "-1"), ("--top_p", "0"), ("--top_p", "1.5")],
)
def test_values_that_mean_nothing(model, capsys, flags):
    assert main(["generate", "--model", str(model), "--prompt", "x", *flags]) == 2
    assert flags[0] in capsys.readouterr().err


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    path = tmp_path_factory.mktemp("heldout") / "d.jsonl"
    pairs = [
        ("Once upon a time", ", there was a cat.", "x q z"),
        ("The dog", " was happy.", " zz"),
        ("Tim", " ran.", "q"),
    ]
    lines = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def reward(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text("def length(prompts, completions, **rest):\n    return [float(len(c)) for c in completions]\n")
    return f"{path}:length"


SHORT = ("--max_new_tokens", "16")


def test_compare_a_model_with_itself(model, heldout, reward, tmp_path, capsys):
    out = tmp_path / "c.json"
    flags = ["--base", str(model), "--aligned", str(model), "--data", heldout, "--reward", reward, *SHORT]
    assert main(["compare", *flags, "--out", str(out), "--show", "1"]) == 0
    result = json.loads(out.read_text())
    assert result["num_prompts"] == 3 and len(result["samples"]) == 3
    rate = result["win_rate"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["rate"]) == (0, 3, 0, 0.5)
    assert rate["low"] < 0.5 < rate["high"] and rate["lines"] == {"harm": 0.5, "good": 0.55}
    base, aligned = result["models"]["base"], result["models"]["aligned"]
    assert base == aligned and base["perplexity"] > 1 and base["perplexity_tokens"] > 10
    assert aligned["kl_to_base"] == 0.0
    assert result["samples"][0]["prompt"] == "Once upon a time"
    assert result["samples"][0]["base_reward"] == len(result["samples"][0]["base"])
    shown = capsys.readouterr().out
    assert "win rate of aligned over base: 50.0%" in shown
    assert "undecided: the reward gave both the same score on every prompt" in shown
    assert "more prompts" not in shown and "the same score" in rate["verdict"]
    assert "Once upon a time" in shown and "The dog" not in shown


def test_compare_prints_json(model, heldout, capsys):
    flags = ["--base", str(model), "--aligned", str(model), "--data", heldout, "--num_prompts", "2", *SHORT]
    assert main(["compare", *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["win_rate"] is None and result["num_prompts"] == 2
    shown = page(result, show=2)
    assert "win rate of" not in shown and "--reward" in shown


def test_compare_tells_of_texts_longer_than_a_model_was_made_for(model, heldout, tmp_path, capsys):
    short = with_context(model, tmp_path / "short", 10)
    flags = ["--base", str(model), "--aligned", short, "--data", heldout, "--max_new_tokens", "2"]
    assert main(["compare", *flags]) == 0
    said = capsys.readouterr().err
    assert f"an answer of {heldout}" in said and f"longer than the 10 tokens that {short}" in said
    assert f"a sample for {heldout}:" not in said and str(model) + " was" not in said
    assert main(["compare", *flags[:-1], "13"]) == 0
    assert f"a sample for {heldout}:1 and 2 more: longer than the 10 tokens" in capsys.readouterr().err
    reward = with_context(Path(make_reward(model, tmp_path / "reward")), tmp_path / "short-reward", 5)
    flags = ["--base", str(model), "--aligned", str(model), "--data", heldout, "--max_new_tokens", "2"]
    assert main(["compare", *flags, "--reward", reward]) == 0
    assert f"longer than the 5 tokens that {reward}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags,words",
    [
        (("--reward", "nowhere.py:f"), "nowhere.py"),
        (("--reward", "MODEL"), "fix:      --reward DIR"),
        (("--confidence", "95"), "--confidence"),
        (("--num_prompts", "0"), "--num_prompts"),
        (("--data", "/no/such.jsonl"), "/no/such.jsonl"),
        (("--base", "/no/such"), "/no/such"),
    ],
)
def test_compare_refuses_before_it_generates(model, heldout, capsys, flags, words):
    flags = [str(model) if f == "MODEL" else f for f in flags]
    given = ["--base", str(model), "--aligned", str(model), "--data", heldout]
    assert main(["compare", *given, *flags]) == 2
    assert words in capsys.readouterr().err


def test_the_page_keeps_markup_and_wide_letters():
    sample = {"prompt": "[bold]x[/bold] 模型", "base": "a", "aligned": "b", "base_reward": None, "aligned_reward": 1.5}
    full = {key: 1.0 if key == "finished" else None for key, _, _ in _ROWS}
    result = {"models": {"base": full, "aligned": full}, "samples": [sample], "win_rate": None, "same_tokenizer": False}
    result |= {"reward": None, "sampling": {"max_new_tokens": 7}}
    text = page(result, show=5)
    assert "[bold]x[/bold] 模型" in text and "[1.5]" in text and "100.0%" in text
    assert "perplexity of" not in text and "do not compare" in text and "max_new_tokens" not in text
    result["models"] = {"base": full, "aligned": full | {"finished": 0.0}}
    text = page(result, show=5)
    assert "no completion of aligned ended" in text and "within 7 tokens" in text and "--max_new_tokens" in text


@pytest.mark.parametrize(
    ("row", "mapped"),
    [
        ({"question": "Q", "answer": "A"}, {"prompt": "question", "completion": "answer"}),
        (
            {"question": "Q", "better": "A", "worse": "B"},
            {"prompt": "question", "chosen": "better", "rejected": "worse"},
        ),
        ({"promt": "Q", "chosen": "A", "rejected": "B"}, {"prompt": "promt"}),
    ],
)
def test_compare_says_which_columns_are_meant_and_takes_them(model, tmp_path, capsys, row, mapped):
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps(row))
    flags = ["compare", "--base", str(model), "--aligned", str(model), "--data"]
    assert main([*flags, str(data)]) == 2
    (flag,) = shlex.split(capsys.readouterr().err.partition("fix:      ")[2])
    assert json.loads(flag.removeprefix("--data=")) == [{"path": str(data), "columns": mapped}]
    assert main([*flags[:-1], flag, "--max_new_tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["base"]["perplexity_tokens"] > 0
    assert main([*flags, str(tmp_path / "d.json")]) == 2
    err = capsys.readouterr().err
    assert f"fix:      --data={data}\n" in err and "data.sources" not in err


def test_wrong_flags_of_a_model_are_said_without_a_config_line(model, tmp_path, capsys):
    flags = ["--prompt", "x", "--max_new_tokens", "1"]
    for path, fix in (
        ("/no/such", "--model DIR, in place of /no/such"),
        (str(tmp_path), f"--model DIR, in place of {tmp_path}"),
    ):
        assert main(["generate", "--model", path, *flags]) == 2
        err = capsys.readouterr().err
        assert f"fix:      {fix}" in err and "--config" not in err
    for file in Path(model).iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    assert main(["generate", "--model", str(tmp_path), *flags]) == 2
    assert f"in {tmp_path}, the tokenizer files of DIR" in capsys.readouterr().err
    assert main(["generate", "--model", str(model), *flags, "--dtype", "float8"]) == 2
    assert "found:    --dtype float8" in capsys.readouterr().err
    assert main(["generate", "--model", str(model), "--prompt", "\udcff"]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_without_the_flag_the_length_is_what_the_model_has_room_for(model, tmp_path, capsys):
    short = with_context(model, tmp_path / "short", 20)
    main(["generate", "--model", str(short), "--prompt", "Once upon a time", "--temperature", "0"])
    assert "longer than" not in capsys.readouterr().err

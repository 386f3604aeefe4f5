"""A model that cannot be used is told by every command, by its own fault and before anything is computed."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.cli import main
from jaxalign.pipeline import compare, loaded
from tests.cli.cases import copied, make_reward, with_token, write_lines

pytestmark = pytest.mark.usefixtures("one_device")

COMMANDS = {
    "generate": ("generate", "--model", "BAD", "--prompt", "a"),
    "logprobs": ("logprobs", "--model", "BAD", "--data", "DATA"),
    "score": ("score", "--model", "BAD", "--data", "DATA"),
    "score_policy": ("score", "--model", "BAD", "--ref", "GOOD", "--beta", "0.1", "--data", "DATA"),
    "score_ref": ("score", "--model", "GOOD", "--ref", "BAD", "--beta", "0.1", "--data", "DATA"),
    "compare_base": ("compare", "--base", "BAD", "--aligned", "GOOD", "--data", "DATA"),
    "compare_aligned": ("compare", "--base", "GOOD", "--aligned", "BAD", "--data", "DATA"),
    "compare_reward": ("compare", "--base", "GOOD", "--aligned", "GOOD", "--data", "DATA", "--reward", "BAD"),
}
SCALAR = ("score", "compare_reward")  # those that want a reward model


@pytest.fixture(scope="module")
def models(request, tmp_path_factory):
    """A language model and a reward model."""
    base = request.getfixturevalue("shared") / "models" / "stories260k-llama"
    folder = tmp_path_factory.mktemp("models")
    return {"lm": copied(base, folder / "lm"), "score": make_reward(base, folder / "reward")}


@pytest.fixture
def refusal(models, tmp_path, capsys, request):
    """What a command says of a model after a change."""

    def refusal(name, change):
        bad = copied(models["score" if name in SCALAR else "lm"], tmp_path / "bad")
        change(bad)
        words = {"BAD": str(bad), "GOOD": str(models["lm"]), "DATA": write_lines(tmp_path / "d.jsonl")}
        assert main([words.get(word, word) for word in COMMANDS[name]]) == 2
        said = capsys.readouterr()
        assert not said.out
        return said.err, str(bad)

    return refusal


@pytest.mark.parametrize("name", COMMANDS)
def test_a_broken_config_is_told_and_not_the_tokenizer(refusal, name):
    err, bad = refusal(name, lambda bad: (bad / "config.json").write_text("{"))
    assert f"found:    {bad}/config.json is not JSON" in err and "tokenizer" not in err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_token_without_a_vector_is_told(refusal, name):
    err, bad = refusal(name, with_token)
    assert "'<|extra|>' (512)" in err and bad in err


@pytest.mark.parametrize("name", COMMANDS)
def test_weights_that_are_no_numbers_are_told(refusal, name):
    def poison(bad):
        tree = load_file(bad / "model.safetensors")
        tree["model.norm.weight"][3] = np.nan
        save_file(tree, bad / "model.safetensors", {"format": "pt"})

    err, _ = refusal(name, poison)
    assert "found:    model.norm.weight in " in err and "holds 1 NaN" in err


@pytest.mark.parametrize("name", ["compare_base", "score_ref"])
def test_a_model_whose_turn_comes_late_is_looked_at_first(name, refusal, monkeypatch):
    def poison(bad):
        tree = load_file(bad / "model.safetensors")
        tree["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
        save_file(tree, bad / "model.safetensors", {"format": "pt"})

    for module in (compare, loaded):
        monkeypatch.setattr(module, "load_model", None)
    err, _ = refusal(name, poison)
    assert "model.layers.1.mlp.up_proj.weight in " in err and "1 infinite" in err


def test_score_of_a_language_model_is_told_the_whole_command(models, tmp_path, capsys):
    data = write_lines(tmp_path / "d.jsonl")
    assert main(["score", "--model", str(models["lm"]), "--data", data]) == 2
    assert f"fix:      jaxalign score --model {models['lm']} --ref DIR --beta 0.1 --data " in capsys.readouterr().err
    assert main(["score", "--model", "m", "--data", data, "--ref", "r"]) == 2
    assert f"fix:      jaxalign score --model m --data {data} --ref r --beta 0.1" in capsys.readouterr().err

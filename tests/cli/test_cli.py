"""The command line: help, flags, errors, exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxalign.cli import main
from jaxalign.errors import InputError
from jaxalign.pipeline.configfile import split_overrides

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "d.jsonl").write_text("{}\n")
    path = tmp_path / "c.py"
    path.write_text(
        "from jaxalign.config import defaults\n"
        "def get_config():\n"
        '    c = defaults("dpo")\n'
        f'    c.workdir, c.model.path, c.data.sources = "w", "org/m", ({str(tmp_path / "d.jsonl")!r},)\n'
        "    return c\n"
    )
    return f"--config={path}"


def failed(capsys, *argv):
    """What a refused command prints; nothing on standard output, no traceback."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert "found: " in err and "expected: " in err and "fix: " in err
    return err


def test_train_hands_the_configuration_over(trainer, config):
    assert main(["train", config, "--config.seed=7", "--config.algorithm.beta", "0.3", "--noconfig.data.shuffle"]) == 0
    ((c, dry),) = trainer
    assert (c.seed, c.algorithm.beta, c.data.shuffle, dry) == (7, 0.3, False, False)


def test_dry_run(trainer, config):
    assert main(["train", config, "--dry_run"]) == 0
    assert trainer[0][1] is True


def test_a_misspelt_field(trainer, config, capsys):
    err = failed(capsys, "train", config, "--config.optimizer.learnin_rate=1")
    assert "--config.optimizer.learning_rate" in err
    assert trainer == []


@pytest.mark.parametrize(
    "argv,words",
    [
        (["train"], "no --config"),
        (["train", "--config=nowhere.py"], "no file nowhere.py"),
        (["train", "configs/dpo.py"], "argument 'configs/dpo.py'"),
        (["trian"], "jaxalign train"),
        (["logprobs", "--model", "m"], "--data"),
        (["generate", "--model", "m", "--prompt", "p", "--temperatur", "0"], "fix:      --temperature\n"),
        (["generate", "--model", "m", "--promt", "p"], "fix:      --prompt\n"),
        (["compare", "--base=b", "--alinged=a", "--data=d"], "fix:      --aligned\n"),
        (["evaluate", "--modle=b", "--data=d"], "fix:      --model\n"),
        (["generate", "--model", "m", "--prompt", "p", "--max_new_tokens", "many"], "many"),
        (["generate", "--model", "/no/such", "--prompt", "p"], "no directory /no/such"),
        (["logprobs", "--model", "m", "--data", "/no/such.jsonl"], "/no/such.jsonl"),
        (["score", "--model", "m", "--data", "d.jsonl", "--ref", "r"], "--ref without --beta"),
        (["score", "--model", "m", "--data", "d.jsonl", "--beta", "0.1"], "--beta without --ref"),
        (["export", "--workdir", "/no/such", "--out", "o"], "/no/such"),
        (["doctor", "now"], "now"),
    ],
)
def test_wrong_input_is_told_in_three_lines(capsys, argv, words):
    assert words in failed(capsys, *argv)


@pytest.mark.parametrize("text", ["", " "])
@pytest.mark.parametrize(
    "command, flag",
    [
        ("score --model=m --data=d --beta=0.1", "ref"),
        ("generate --prompt=a", "model"),
        ("generate --model=m --prompt=a", "dtype"),
        ("compare --base=m --aligned=m --data=d", "reward"),
        ("compare --base=m --aligned=m --data=d", "out"),
        ("export --workdir=w --out=o", "stage"),
    ],
)
def test_a_blank_flag_is_no_value(capsys, command, flag, text):
    assert f"--{flag} is {text!r}" in failed(capsys, *command.split(), f"--{flag}={text}")


def test_unknown_flag_of_train(capsys, config, trainer):
    assert "bogus" in failed(capsys, "train", config, "--bogus=1")


def test_values_out_of_bounds(capsys, config, trainer):
    err = failed(capsys, "train", config, "--config.batch_size=3", "--config.grad_accum_steps=2")
    assert "--config.batch_size=4" in err
    assert trainer == []


def test_help_pages(capsys):
    commands = (
        "train",
        "plan",
        "config",
        "export",
        "generate",
        "chat",
        "logprobs",
        "score",
        "evaluate",
        "compare",
        "doctor",
    )
    for command in commands:
        assert main([command, "--help"]) == 0
        page = capsys.readouterr().out
        assert f"jaxalign {command}" in page
    assert main(["--help"]) == main([]) == main(["-h"]) == 0
    page = capsys.readouterr().out
    for word in (
        "train",
        "config",
        "export",
        "generate",
        "logprobs",
        "score",
        "evaluate",
        "compare",
        "doctor",
        "SFT",
        "DPO",
        "PPO",
    ):
        assert word in page
    assert max(map(len, page.splitlines())) <= 120


def test_the_module_is_a_program_too():
    assert fresh("-m", "jaxalign.cli", "--version").stdout.startswith("jaxalign ")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jaxalign 0.")


def test_sampling_defaults_are_the_configurations(capsys):
    from jaxalign.config import defaults

    assert main(["generate", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    rollout = defaults("ppo").rollout
    for value in (rollout.temperature, rollout.top_k, rollout.top_p):
        assert f"default {value}" in page
    assert f"default: {rollout.max_new_tokens}, or what the model has room for" in page


def test_split_overrides_keeps_the_order():
    rest, overrides = split_overrides(["--config.a=1", "--config=f", "-config.b", "-1", "--config.c", "--dry_run"])
    assert rest == ["--config=f", "--dry_run"]
    assert overrides == [("a", "1"), ("b", "-1"), ("c", None)]


def test_an_interrupted_run_keeps_its_status(monkeypatch, config, trainer):
    import jaxalign.pipeline.stages as stages

    def stop(*args, **kwargs):
        raise SystemExit(143)

    monkeypatch.setattr(stages, "run", stop)
    assert main(["train", config]) == 143


@pytest.mark.parametrize("echo", [KeyboardInterrupt, RuntimeError])
def test_ctrl_c_is_one_line_and_130(monkeypatch, capsys, config, trainer, echo):
    """Also where a library has made an error of its own of it, or cleaning up fails after it."""
    import jaxalign.pipeline.stages as stages
    import jaxalign.train.interrupts  # noqa: F401

    def interrupted(*args, **kwargs):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise echo("CpuCallback error") from None

    monkeypatch.setattr(stages, "run", interrupted)
    assert main(["train", config]) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "interrupted" in err


def test_other_errors_keep_their_traceback(monkeypatch, config):
    import jaxalign.pipeline.stages as stages

    def fail(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(stages, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", config])


def test_fixes_speak_of_the_commands_own_flags(monkeypatch, capsys):
    import jaxalign.pipeline.logprobs as module

    def refuse(*args, **kwargs):
        raise InputError("a", "b", "--config.model.path=DIR")

    monkeypatch.setattr(module, "logprobs", refuse)
    assert "--model=DIR" in failed(capsys, "logprobs", "--model", "m", "--data", "d")


def fresh(*argv, **env):
    """A process of its own."""
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})


def test_help_and_import_load_nothing_heavy():
    code = (
        "import sys, jaxalign, jaxalign.cli; jaxalign.cli.main(['--help'])\n"
        "heavy = {'jax', 'flax', 'transformers', 'orbax', 'datasets', 'numpy', 'optax'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = fresh("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_misspelt_field_in_a_process_of_its_own(config):
    done = fresh("-m", "jaxalign", "train", config, "--config.algorithm.bета=1".replace("ета", "eta_"))
    assert done.returncode == 2
    assert "--config.algorithm.beta=1" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_output_into_a_closed_pipe_is_no_error(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m jaxalign --help | head -n 1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert json.dumps(done.stdout)


def test_a_run_without_stages_is_exported_without_one(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    for file in (run / "config.json", run / "export" / "config.json"):
        file.write_text("{}")
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "out"), "--stage", "sft"]) == 2
    err = capsys.readouterr().err
    assert "is a run without stages" in err and "--stage export" not in err


def test_compare_refuses_an_impossible_out_before_it_begins(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text("{}\n")
    for out in ("/sys/foo", "d.jsonl/x", "."):
        err = failed(
            capsys, "compare", "--base", "no/model", "--aligned", "no/model", "--data", "d.jsonl", "--out", out
        )
        assert f"--out {out}" in err


@pytest.mark.parametrize(
    "argv", [("train", "--config=" + "x" * 3000), ("generate", "--prompt=a", "--model=" + "y" * 3000)]
)
def test_a_path_that_no_file_system_takes_is_named_by_its_flag(capsys, argv):
    assert main(list(argv)) == 2
    said = capsys.readouterr().err
    assert f"found:    {argv[-1].partition('=')[0]}" in said and "expected:" in said and len(said) < 1000

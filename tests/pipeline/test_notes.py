"""Where what a config names is not there yet, the error gives the commands that make it."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxalign.cli import main
from jaxalign.config import get
from jaxalign.examples import assets
from jaxalign.pipeline.configfile import load_config
from jaxalign.pipeline.notes import first

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(config, *flags):
        assert main(["train", f"--config={ROOT / 'configs' / config}", "--dry_run", *flags]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("config", ["toy/sft.py", "toy/dpo.py", "toy/reward.py", "toy/ppo.py", "quickstart.py"])
def test_a_world_that_is_not_there(said, config):
    assert 'import write_assets; write_assets("runs/' in said(config).partition("fix: ")[2]


def test_the_command_makes_what_is_missing(said, tmp_path):
    command = first(str(ROOT / "configs" / "toy" / "sft.py"))[0].replace(".venv/bin/python", sys.executable)
    code = "from jaxalign.examples import assets; assets.COUNTS = dict.fromkeys(assets.COUNTS, 40)"
    subprocess.run(["bash", "-c", command.replace("-c '", f"-c '{code}; ")], check=True, cwd=tmp_path)
    assert (tmp_path / load_config(str(ROOT / "configs" / "toy" / "sft.py")).model.path / "config.json").is_file()
    error = said("toy/dpo.py")
    assert "no directory runs/toy/sft/export" in error and "--config=configs/toy/sft.py" in error


@pytest.mark.parametrize("config", ["dpo.py", "ppo.py", "reward.py"])
def test_a_model_of_another_config(said, config):
    fix = said(config).partition("fix: ")[2]
    assert "bash launch/gpu_node.sh --config=configs/sft.py" in fix and "--config.model.path=" in fix


def test_what_a_flag_names_is_no_config_files_concern(said):
    error = said("toy/dpo.py", "--config.data.sources=runs/toy/none/none.jsonl")
    assert "write_assets" not in error and "none.jsonl" in error


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_every_config_that_starts_from_another_says_what_comes_first(config):
    path = get(load_config(str(config)), "model.path") or ""
    commands = first(str(config))
    assert commands or path.count("/") < 2
    for command in commands:
        for word in command.split():
            if word.startswith("--config="):
                assert (ROOT / word.removeprefix("--config=")).is_file()
    assert assets.__name__ in " ".join(commands) or "/world/" not in path

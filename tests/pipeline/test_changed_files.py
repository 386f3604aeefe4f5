"""Files that changed since a run was done or stopped, with a trainer that only leaves what a run leaves."""

import copy
import json
import sys
import types
from pathlib import Path

import pytest

import jaxalign.train
from jaxalign.config import defaults
from jaxalign.config import stages as several
from jaxalign.pipeline import stages


@pytest.fixture
def trainer(monkeypatch):
    """Trains nothing; `done` says whether it comes to its end."""
    fake = types.ModuleType("jaxalign.train.trainer")
    fake.done = True

    def run(checked, dry_run=False):
        workdir = Path(checked.config.workdir)
        if (workdir / "DONE").exists():
            return json.loads((workdir / "DONE").read_text())
        (workdir / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
        if fake.done:
            (workdir / "DONE").write_text('{"steps": 1}')
        return {"steps": 1}

    fake.run = run
    monkeypatch.setitem(sys.modules, "jaxalign.train.trainer", fake)
    monkeypatch.setattr(jaxalign.train, "trainer", fake, raising=False)
    return fake


def ppo(folder):
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "reward.py").write_text("def f(prompts, completions):\n    return [1.0] * len(prompts)\n")
    c = defaults("ppo")
    c.workdir, c.model.path, c.data.sources = str(folder / "run"), "org/model", (str(folder / "prompts.jsonl"),)
    c.rewards.function = f"{folder / 'reward.py'}:f"
    return c


@pytest.mark.parametrize("name", ["prompts.jsonl", "reward.py"])
def test_what_a_finished_run_has_learned_from_is_compared(name, trainer, tmp_path):
    config, lines = ppo(tmp_path), []
    stages.run(config, log=lines.append)
    stages.run(config, log=lines.append)
    assert not any("changed" in line for line in lines)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n\n")
    stages.run(config, log=lines.append)
    (told,) = (line for line in lines if "changed" in line)
    assert told.startswith("warning: ") and name in told and "another --config.workdir" in lines[-2]


def test_a_stage_goes_on_with_another_reward_where_that_is_asked_for(trainer, tmp_path):
    def run(**checkpoint):
        config, lines = several(str(tmp_path / "road"), ppo=copy.deepcopy(section)), []
        config.ppo.checkpoint.update(checkpoint)
        stages.run(config, log=lines.append)
        return " ".join(lines)

    section, trainer.done = ppo(tmp_path), False
    run()
    reward = tmp_path / "reward.py"
    reward.write_text(reward.read_text() + "\n")
    assert "resuming with another reward" in run(resume="reward")
    assert "stage ppo: resuming (" in run()  # noted
    reward.write_text(reward.read_text() + "\n")
    assert "--config.ppo.checkpoint.resume=reward" in run() and (tmp_path / "road" / "ppo.old-1").exists()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "b"}\n')
    told = run(resume="reward")
    assert "changed" in told and "resume=reward" not in told and (tmp_path / "road" / "ppo.old-2").exists()

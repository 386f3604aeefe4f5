"""The line about a run that had come to its end before."""

import json
import sys
import types

import jaxalign.train
from jaxalign.config import defaults
from jaxalign.pipeline import stages


def test_a_run_that_was_done_before_says_so(monkeypatch, tmp_path):
    done = {"steps": 1, "metrics": {"loss": 1.0}}
    trainer = types.ModuleType("jaxalign.train.trainer")
    trainer.run = lambda config, dry_run=False: dict(done)
    monkeypatch.setitem(sys.modules, "jaxalign.train.trainer", trainer)
    monkeypatch.setattr(jaxalign.train, "trainer", trainer, raising=False)
    config = defaults("sft")
    config.workdir, config.model.path = str(tmp_path), "org/model"
    config.data.sources = ("org/data",)
    lines = []
    stages.run(config, log=lines.append)
    assert "done" in lines[-1] and "nothing was trained" not in lines[-1]
    (tmp_path / "DONE").write_text(json.dumps(done))
    stages.run(config, log=lines.append)
    assert "nothing was trained" in lines[-1]

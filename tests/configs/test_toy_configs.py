"""The toy configs run as they are, one on the other's results, on one device."""

import json
import math
from pathlib import Path

import jax
import pytest

from jaxalign.examples import assets
from jaxalign.pipeline.configfile import load_config
from jaxalign.train import trainer

TOY = Path(__file__).resolve().parents[2] / "configs" / "toy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds the toy world where the configs look for it, with fewer records than they would find."""
    root = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "COUNTS", {name: 300 for name in assets.COUNTS})
        assets.write_assets(root / "runs" / "toy" / "world")
    return root


def run(folder, name, monkeypatch):
    """The stage's results, and its metrics by step."""
    monkeypatch.chdir(folder)
    config = load_config(str(TOY / f"{name}.py"), [("logging.trackers", "None"), ("logging.progress", "false")])
    results = trainer.run(config, devices=jax.devices()[:1])
    rows = [json.loads(line) for line in (folder / config.workdir / "metrics.jsonl").read_text().splitlines()]
    return results, [
        row for row in rows if "learning_rate" in row or "learning_rate/policy" in row
    ]  # of training steps


@pytest.mark.filterwarnings("ignore:optimizer.learning_rate")
@pytest.mark.slow
def test_the_toy_configs_make_a_whole_road(folder, monkeypatch):
    results, rows = run(folder, "sft", monkeypatch)
    assert rows[0]["loss"] == pytest.approx(math.log(512), abs=0.4)  # the vocabulary, before anything is learnt
    assert rows[-1]["loss"] < 1.0
    assert results["num_compiles"] == 1

    results, rows = run(folder, "reward", monkeypatch)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.2)
    assert rows[-1]["loss"] < 0.4
    assert Path(results["export"]).name == "export"

    results, rows = run(folder, "dpo", monkeypatch)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] < 0.5
    assert set(results["model_bytes"]) == {"policy", "ref"}

    results, rows = run(folder, "ppo", monkeypatch)
    assert len(rows) == 6
    assert rows[0]["objective/kl"] == 0.0
    assert 0 < rows[-1]["objective/kl"] < 20
    assert all(math.isfinite(row["objective/scores"]) for row in rows)
    assert set(results["model_bytes"]) == {"policy", "value", "ref", "reward"}

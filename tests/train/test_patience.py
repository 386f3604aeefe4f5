"""Early stopping: a run ends when its best metric no longer becomes better, and after a stop at the same step."""

import json

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file

from jaxalign.config import defaults, validate
from jaxalign.errors import InputError
from jaxalign.train import trainer
from jaxalign.train.best import Patience


def config(patience=2, mode="min", every=2):
    c = defaults("sft")
    c.checkpoint.patience, c.checkpoint.best_metric, c.checkpoint.best_mode = patience, "loss", mode
    c.eval.every = every
    return c


def ends(values, **options):
    """The step at which a run of these evaluations ends; None where it does not."""
    patience = Patience(config(**options))
    for step, value in enumerate(values, 1):
        patience.add(2 * step, {"eval/loss": value})
        if patience.spent:
            return 2 * step
    return None


@pytest.mark.parametrize(
    "values, options, step",
    [
        ([3, 2, 1], {}, None),
        ([3, 2, 2, 2], {}, 8),
        ([3, 4, 2, 3, 3], {}, 10),
        ([1, 2, 3, 2, 1], {"mode": "max"}, 10),
        ([3, None, 2.9, None, 5], {}, 10),
        ([None, None], {}, 4),
        ([float("nan"), 1.0, 0.5], {}, None),
        ([1.0, float("nan"), float("inf")], {}, 6),
        ([3, 4, 5, 6], {"patience": None}, None),
    ],
)
def test_evaluations_without_a_better_one_are_counted(values, options, step):
    assert ends(values, **options) == step


def test_it_knows_from_the_rows_what_it_knew_and_leaves_out_other_steps():
    rows = [{"step": 2, "eval/loss": 1.0}, {"step": 3, "eval/loss": 0.1}, {"step": 4, "eval/loss": 1.5}, {"step": 4}]
    patience = Patience(config(), rows)
    assert not patience.spent
    patience.add(6, {"eval/loss": 1.2})
    assert patience.spent and "step 2" in patience.sentence(6)


def run(shared, workdir, **fields):
    fields = {
        "data.max_length": 64, "data.max_records": 16, "data.eval_fraction": 0.25, "eval.every": 2, "batch_size": 4,
        "num_train_steps": 10, "checkpoint.every": 0, "checkpoint.best_metric": "eval/loss", "checkpoint.patience": 2,
        "optimizer.learning_rate": 0.0,
    } | fields  # fmt: skip
    return trainer.run(make_config(stories(shared, workdir, "sft", **fields)), devices=jax.devices()[:1])


def test_a_run_ends_early_exports_the_best_and_ends_there_when_resumed(shared, tmp_path, capsys):
    done = run(shared, tmp_path / "run")  # nothing is learned: no evaluation is better than the first
    evals = [
        (row["step"], row["eval/loss"])
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "eval/loss" in row
    ]
    assert done["steps"] == 6 and [step for step, _ in evals] == [2, 4, 6]
    assert "stopped early" in capsys.readouterr().err
    assert run(shared, tmp_path / "run") == done  # it is done
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    (tmp_path / "run" / "DONE").unlink()  # as if it had been killed before the export
    again = run(shared, tmp_path / "run")
    assert again["steps"] == done["steps"] and again["metrics"] == done["metrics"]
    other = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert all(np.array_equal(exported[name], other[name]) for name in exported)


def test_patience_needs_a_metric():
    c = config()
    c.workdir, c.model.path, c.data.sources, c.data.eval_fraction = "w", "m", ("d",), 0.1
    validate(c)
    c.checkpoint.best_metric = None
    with pytest.raises(InputError, match="best_metric"):
        validate(c)

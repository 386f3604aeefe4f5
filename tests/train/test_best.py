"""Evaluations that are due after the run's end alone are told."""

from types import SimpleNamespace

import pytest

from jaxalign.config import defaults
from jaxalign.train.best import rarely


@pytest.mark.parametrize(
    "every,steps,data,best,words",
    [
        (500, 100, True, None, ("eval.every is 500", "100 steps")),
        (500, 100, True, "eval/loss", ("best_metric=eval/loss",)),
        (100, 100, True, "eval/loss", ()),
        (0, 100, True, None, ()),
        (500, 100, None, None, ()),
    ],
)
def test_evaluations_that_never_come(every, steps, data, best, words):
    config = defaults("sft")
    config.eval.every, config.checkpoint.best_metric = every, best
    said = rarely(SimpleNamespace(config=config, num_steps=steps, eval_dataset=data))
    assert len(said) == bool(words) and all(word in said[0] for word in words)

"""IPO's two forms, from the configuration to the loss."""

import numpy as np
import pytest

from jaxalign.config import defaults, validate
from jaxalign.errors import InputError
from jaxalign.ops.readout import completion_sums
from jaxalign.pipeline.overrides import override
from jaxalign.steps.preference import by_pair, sequence_logprobs
from jaxalign.steps.step import make_eval_step
from jaxalign.train import algorithms
from jaxalign.train.models import Role
from tests.steps import worlds


class Models:
    """A loader whose models are there already."""

    def __init__(self, model):
        self.role = Role(model, lambda: None)

    def policy(self, learning_rate):
        return self.role

    def reference(self, path=None):
        return self.role


@pytest.mark.parametrize("average", [None, True, False])
def test_ipo_is_averaged_or_summed_as_the_configuration_says(x64, average):
    config = defaults("dpo")
    override(config, "algorithm.loss", "ipo")
    override(config, "algorithm.average", str(average))
    assert config.algorithm.average is average
    model, batch = worlds.model("lm"), worlds.data("ipo")
    params, frozen = worlds.start("ipo")
    objective = algorithms.build(config, Models(model), None).objective
    total, weight = make_eval_step(objective)(params, frozen, {}, batch)["loss"]

    sums = [sequence_logprobs(model.apply, model.head, tree, batch) for tree in (params["policy"], frozen["ref"])]
    policy, ref = (by_pair(x, batch) for x in sums)
    readouts = batch.readouts
    counts = by_pair(completion_sums(readouts.mask, readouts, batch.completions.mask.shape[1]), batch)
    weights = np.asarray(by_pair(batch.completions.weight, batch)["chosen"])
    parts = {k: np.asarray(policy[k] - ref[k]) for k in ("chosen", "rejected")}
    if average is not False:
        parts = {k: parts[k] / np.maximum(np.asarray(counts[k]), 1) for k in parts}
    each = (parts["chosen"] - parts["rejected"] - 1 / (2 * config.algorithm.beta)) ** 2
    np.testing.assert_allclose(total / weight, np.sum(weights * each) / np.sum(weights), rtol=1e-9)


@pytest.mark.parametrize("average", [True, False])
def test_only_ipo_has_two_forms(average):
    config = defaults("dpo")
    config.algorithm.average = average
    with pytest.raises(InputError, match=r"algorithm\.average=.* with the sigmoid loss"):
        validate(config, inputs=False)

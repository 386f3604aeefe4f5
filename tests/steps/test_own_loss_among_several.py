"""A user's own loss on pairs beside those of the table: its name, options and weights, in training and after."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.config import defaults
from jaxalign.pipeline.evaluate import _of_losses
from jaxalign.steps import preference
from jaxalign.train.named_functions import own_loss
from jaxalign.types import Terms

LOGPROBS = {"chosen": np.array([-2, -3, -4], np.float32), "rejected": np.array([-5, -2, -9], np.float32)}
TOKENS = {"chosen": np.array([2, 3, 7], np.float32), "rejected": np.array([4, 1, 2], np.float32)}
WEIGHT = np.array([1, 2, 0], np.float32)  # the last pair counts for nothing
OWN = """
import jax.numpy as jnp
from jaxalign.types import Terms

def loss(policy, ref, lengths, mask, *, beta, label_smoothing=0.0, simpo_gamma=0.5):
    return Terms(jnp.where(mask != 0, label_smoothing + 100 * simpo_gamma, jnp.nan), 7 * jnp.ones_like(mask), {})
"""


def trained(monkeypatch, loss, **given):
    """The loss of a batch of these pairs, as a step computes it."""
    arrays = lambda values: {side: jnp.asarray(x) for side, x in values.items()}  # noqa: E731
    monkeypatch.setattr(preference, "logprobs_and_aux", lambda *_: (jnp.zeros(()), {}))
    monkeypatch.setattr(preference, "by_pair", lambda *_: arrays(LOGPROBS))
    monkeypatch.setattr(preference, "_tokens", lambda _: arrays(TOKENS))
    monkeypatch.setattr(preference, "pair_weights", lambda _: jnp.asarray(WEIGHT))
    given = {"label_smoothing": 0.0, "beta": 0.1, "reference": "none"} | given
    objective = preference.preference_objective(None, None, loss=loss, **given)
    batch = SimpleNamespace(completions=None)
    sums, weights = objective.terms({"policy": None}, {}, {}, None, batch), objective.weights(batch)
    return {term: objective.coefs.get(term, 1) * float(total / weights[term]) for term, total in sums.terms.items()}


@pytest.mark.parametrize("name", ["sft", "dpop"])
def test_a_function_is_not_the_loss_of_the_table_that_has_its_name(monkeypatch, name):
    """Its mean is one over pairs, and the other is added to it."""

    def own(policy, ref, lengths, mask, *, beta):
        return Terms(jnp.array([10.0, 40.0, 5.0]), mask, {})

    own.__name__ = name
    assert trained(monkeypatch, own) == {"policy": pytest.approx(30)}
    found = trained(monkeypatch, own, extra_losses=((name, 0.5),))
    assert len(found) == 2 and found[f"policy/own_{name}"] == pytest.approx(30)
    if name == "sft":
        assert found["policy/sft"] == pytest.approx(0.5 * (1 * 2 + 2 * 3) / (1 * 2 + 2 * 3))


@pytest.mark.parametrize("more", [{}, {"extra_losses": (("simpo", 0.25),), "simpo_gamma": 2.0}])
def test_the_command_that_evaluates_gives_an_own_loss_what_training_gives_it(monkeypatch, tmp_path, more):
    """Fields that its signature has, and weights of the records, whatever those that it returns."""
    (tmp_path / "own.py").write_text(OWN)
    cfg = defaults("dpo").algorithm
    with cfg.unlocked():
        cfg.update({"loss": f"{tmp_path / 'own.py'}:loss", "label_smoothing": 0.1, "beta": 2.0} | more)
    each = {**LOGPROBS, **{f"tokens_{side}": x for side, x in TOKENS.items()}, "weight": WEIGHT}
    found = _of_losses(each, {side: np.zeros_like(x) for side, x in LOGPROBS.items()}, cfg)["loss"]
    own = own_loss(cfg.loss)
    assert found == pytest.approx(sum(trained(monkeypatch, own, beta=2.0, label_smoothing=0.1, **more).values()))
    assert found > 50

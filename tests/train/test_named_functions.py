"""Losses, optimizers, schedules and callbacks of the user's own; Muon."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file

from jaxalign.config import defaults, validate
from jaxalign.errors import InputError
from jaxalign.ops.advantages import gae
from jaxalign.train import trainer
from jaxalign.train.named_functions import check_functions, own_estimator, own_loss
from jaxalign.train.optimizer import make_optimizer, make_schedule, updates_made

OWN = """
import jax, jax.numpy as jnp, optax
from jaxalign.ops.advantages import gae
from jaxalign.ops.losses_preference import sigmoid_loss
from jaxalign.types import Terms

def loss(policy, ref, lengths, mask, *, beta):
    return sigmoid_loss(policy, ref, lengths, mask, beta=beta)

def weights_of_its_own(policy, ref, lengths, mask, *, beta):
    return sigmoid_loss(policy, ref, lengths, mask, beta=beta)._replace(weight=7 * jnp.ones_like(mask))

def no_terms(policy, ref, lengths, mask, *, beta):
    return policy["chosen"]

def broken(policy, ref, lengths, mask, *, beta):
    return 1 / 0

def few(policy):
    return policy

def estimator(rewards, mask, *, values, group, gamma, gae_lambda):
    return gae(rewards, mask, values=values, group=group, gamma=gamma, gae_lambda=gae_lambda)

def unknown_option(rewards, mask, *, values, group, lam):
    return rewards, rewards

def no_returns(rewards, mask, *, values, group):
    return rewards, None

def optimizer(learning_rate):
    return optax.adamw(learning_rate, 0.9, 0.999, eps=1e-8, weight_decay=0.0)

def no_optimizer(learning_rate):
    return 3

def schedule(step, num_steps):
    return 1.0 - 0.9 * step / num_steps

def vector(step, num_steps):
    return jnp.ones(3)

seen = []

def callback(step, metrics, state):
    seen.append((step, metrics["loss"], int(state.step)))
    return {"mine/twice": 2 * metrics["loss"]}

def wrong(step, metrics, state):
    return "words"

def raises(step, metrics, state):
    raise SystemExit(0)
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return lambda name: f"{file}:{name}"


def test_pairs_are_weighed_by_their_records_whatever_a_loss_returns(own):
    """The divisor is known beforehand, so what is divided must have the same weights."""
    import jaxalign.steps.preference as preference

    pairs = {side: jax.random.normal(jax.random.key(i), (4,)) for i, side in enumerate(("chosen", "rejected"))}
    weight, found = jnp.array([1.0, 0.0, 2.0, 0.0]), {}
    for name in ("loss", "weights_of_its_own"):
        terms = own_loss(own(name))(pairs, jax.tree.map(jnp.zeros_like, pairs), pairs, weight, beta=0.1)
        found[name] = preference.pair_sum(terms, weight)
    assert found["loss"] == found["weights_of_its_own"] > 0


def run(shared, workdir, algorithm, **fields):
    fields = {"num_train_steps": 3, "checkpoint.every": 0, "data.max_length": 64, "data.max_records": 16} | fields
    if algorithm == "dpo":
        fields = {"data.max_prompt_length": 40} | fields
    return trainer.run(make_config(stories(shared, workdir, algorithm, **fields)), devices=jax.devices()[:1])


def test_own_loss_optimizer_and_schedule_equal_the_packages(shared, tmp_path, own):
    fields = {"optimizer.schedule": "linear", "optimizer.learning_rate": 1e-4}
    run(shared, tmp_path / "one", "dpo", **fields)
    fields |= {
        "algorithm.loss": own("loss"), "optimizer.name": own("optimizer"), "optimizer.schedule": own("schedule"),
    }  # fmt: skip
    run(shared, tmp_path / "other", "dpo", **fields)
    one, other = (load_file(tmp_path / w / "export" / "model.safetensors") for w in ("one", "other"))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-7)


def test_callbacks_see_each_step_and_add_figures(shared, tmp_path, own):
    run(shared, tmp_path / "run", "sft", callbacks=(own("callback"),))
    import sys

    seen = sys.modules["jaxalign_callback_own"].seen
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert seen == [(step, losses[step], step) for step in (1, 2, 3)]
    assert {row["step"]: row["mine/twice"] for row in rows if "mine/twice" in row} == {
        step: 2 * loss for step, loss in losses.items()
    }


def test_own_estimator_is_the_tables_where_it_computes_the_same(own):
    c = defaults("ppo")
    found = own_estimator(own("estimator"), c.algorithm)
    rewards, values = (jax.random.normal(jax.random.key(i), (2, 5)) for i in (0, 1))
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    options = {"gamma": 0.9, "gae_lambda": 0.8}
    ours = gae(rewards, mask, values=values, **options)
    theirs = found(rewards, mask, values=values, group=jnp.arange(2), **options)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "name, words", [("few", "rewards, mask"), ("unknown_option", "'lam'"), ("no_returns", "returns")]
)
def test_estimators_are_tried_at_start(own, name, words):
    c = defaults("ppo")
    c.workdir, c.model.path, c.data.sources, c.rewards.model = "w", "m", ("d",), "r"
    c.algorithm.estimator = own(name)
    validate(c)
    with pytest.raises(InputError, match=words):
        check_functions(c)


@pytest.mark.parametrize("name, words", [("wrong", "returned str"), ("raises", "SystemExit")])
def test_a_wrong_callback_ends_the_run_in_words(shared, tmp_path, own, name, words):
    with pytest.raises(InputError, match=words):
        run(shared, tmp_path / "run", "sft", callbacks=(own(name),))


@pytest.mark.parametrize(
    "field, name, words",
    [
        ("algorithm.loss", "few", "policy, ref, lengths, mask"),
        ("algorithm.loss", "no_terms", "Terms"),
        ("algorithm.loss", "broken", "ZeroDivisionError"),
        ("algorithm.loss", "los", "loss"),
        ("optimizer.name", "few", "GradientTransformation"),
        ("optimizer.name", "no_optimizer", "returned int"),
        ("optimizer.schedule", "few", "step, num_steps"),
        ("optimizer.schedule", "vector", "one number"),
        ("callbacks", "few", "step, metrics, state"),
    ],
)
def test_functions_are_tried_at_start(own, field, name, words):
    c = defaults("dpo")
    c.workdir, c.model.path, c.data.sources = "w", "m", ("d",)
    section, _, leaf = field.rpartition(".")
    (c[section] if section else c)[leaf] = (own(name),) if field == "callbacks" else own(name)
    validate(c)
    with pytest.raises(InputError) as error:
        check_functions(c)
    assert words in str(error.value), error.value


def test_fields_that_take_no_function_say_so():
    c = defaults("dpo")
    c.workdir, c.model.path, c.data.sources = "w", "m", ("d",)
    c.optimizer.name = "mon"
    with pytest.raises(InputError, match="FUNCTION"):
        validate(c)
    c.optimizer.name, c.optimizer.state_dtype = "muon", "bfloat16"
    with pytest.raises(InputError, match="muon"):
        validate(c)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    cfg = defaults("sft").unlock().optimizer
    cfg.name, cfg.max_grad_norm, cfg.schedule = "muon", 0.0, "constant"
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (7, 4))},
        "layers": {
            "attention": {
                "query": {"kernel": jax.random.normal(keys[1], (2, 4, 2, 3))},
                "out": {"kernel": jax.random.normal(keys[2], (2, 2, 3, 4))},
            },
            "mlp": {"up": {"kernel": jax.random.normal(keys[3], (2, 4, 8))}},
            "norm": {"scale": jnp.ones((2, 4))},
        },
    }
    tx = make_optimizer(cfg, 1.0, 10)
    updates, state = tx.update(params, tx.init(params), params)  # the gradients are the parameters
    assert int(updates_made(state)) == 1
    adam, _ = (a := optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)).update(params, a.init(params))
    np.testing.assert_allclose(updates["embed"]["embedding"], -adam["embed"]["embedding"], rtol=1e-6)
    np.testing.assert_allclose(updates["layers"]["norm"]["scale"], -adam["layers"]["norm"]["scale"], rtol=1e-6)
    shapes = {"query": (4, 6), "out": (6, 4)}
    for layer in range(2):
        for name, shape in shapes.items():
            kernel = updates["layers"]["attention"][name]["kernel"][layer].reshape(shape)
            values = np.linalg.svd(kernel, compute_uv=False) / (0.2 * np.sqrt(max(shape)))
            assert np.all((values > 0.5) & (values < 1.4)), (name, values)  # five Newton-Schulz steps come that near
        values = np.linalg.svd(updates["layers"]["mlp"]["up"]["kernel"][layer], compute_uv=False)
        assert np.all((values / (0.2 * np.sqrt(8)) > 0.5) & (values / (0.2 * np.sqrt(8)) < 1.4))


def test_muon_trains_and_resumes(shared, tmp_path):
    fields = {"optimizer.name": "muon", "optimizer.learning_rate": 1e-3, "optimizer.schedule": "constant"}
    run(shared, tmp_path / "run", "sft", **fields, num_train_steps=2)
    run(shared, tmp_path / "run", "sft", **fields, num_train_steps=4)
    run(shared, tmp_path / "whole", "sft", **fields, num_train_steps=4)
    one, other = (load_file(tmp_path / w / "export" / "model.safetensors") for w in ("run", "whole"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_an_own_schedule_is_a_share_of_the_peak(own):
    cfg = defaults("sft").unlock().optimizer
    cfg.schedule, cfg.warmup_steps = own("schedule"), 2
    schedule = make_schedule(cfg, 2.0, 10)
    assert [round(float(schedule(i)), 3) for i in (0, 1, 5, 10)] == [1.0, 2.0, 1.1, 0.2]

"""The configuration: defaults that pass, mistakes that are named, values outside the guides' ranges that warn."""

from pathlib import Path

import pytest

from jaxalign import config as configuration
from jaxalign.config import defaults, stages, to_dict, validate
from jaxalign.errors import InputError
from jaxalign.pipeline.mistakes import nearest_field


def ready(algorithm):
    c = defaults(algorithm)
    c.workdir, c.model.path, c.data.sources = "runs/x", "model", ("data.jsonl",)
    if algorithm == "ppo":
        c.rewards.function = "rewards.py:reward"
    return c


@pytest.mark.parametrize("algorithm", configuration.ALGORITHMS)
def test_defaults_pass_without_a_warning(algorithm):
    assert validate(ready(algorithm)) == []
    assert to_dict(ready(algorithm))["algorithm"]["name"] == algorithm


@pytest.mark.parametrize("field", ["workdir", "model.path", "data.sources"])
def test_what_has_no_default_must_be_set(field):
    c = defaults("sft")
    for other in ("workdir", "model.path"):
        if other != field:
            c.update_from_flattened_dict({other: "x"})
    if field != "data.sources":
        c.data.sources = ("x",)
    with pytest.raises(InputError, match=f"{field} is not set"):
        validate(c)


def test_trap_bfloat16_weights_that_do_not_move_are_refused():
    c = ready("dpo")
    c.model.param_dtype = "bfloat16"
    with pytest.raises(InputError, match="bfloat16 weights at a learning rate of 1e-06"):
        validate(c)
    c.optimizer.learning_rate = 1e-4
    assert validate(c) != []  # allowed, though far above the guides' range


@pytest.mark.parametrize(
    ("algorithm", "field", "value", "words"),
    [
        ("dpo", "algorithm.loss", "sigmod", "algorithm.loss is 'sigmod'"),
        ("sft", "model.remat", "some", "model.remat is 'some'"),
        ("sft", "model.attention", "flash", "model.attention is 'flash'"),
        ("sft", "batch_size", 0, "batch_size is 0"),
        ("sft", "grad_accum_steps", 7, "not divisible by grad_accum_steps 7"),
        ("dpo", "data.max_prompt_length", 1024, "data.max_prompt_length is 1024"),
        ("sft", "checkpoint.best_metric", "eval/loss", "eval.every is 0 and there is nothing to evaluate on"),
        ("sft", "checkpoint.resume", "half", "checkpoint.resume is 'half'"),
        ("ppo", "rollout.temperature", 0.0, "rollout.temperature is 0"),
        ("ppo", "rollout.max_new_tokens", 1024, "rollout.max_new_tokens 1024"),
        ("ppo", "rewards.function", None, "PPO without a reward"),
        ("ppo", "rewards.model", "dir", "both rewards.model and rewards.function"),
        ("ppo", "algorithm.num_minibatches", 7, "not divisible by num_minibatches 7"),
    ],
)
def test_mistakes_are_named(algorithm, field, value, words):
    c = ready(algorithm)
    c.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as raised:
        validate(c)
    assert words in raised.value.found
    assert "--config." in raised.value.fix


@pytest.mark.parametrize(
    ("algorithm", "field", "value", "proposed"),
    [
        ("dpo", "algorithm.beta", -1.0, 0.1),
        ("sft", "optimizer.max_grad_norm", -1.0, 1.0),
        ("ppo", "algorithm.gae_lambda", 1.5, 0.95),
        ("ppo", "algorithm.max_approx_kl", 0.0, 1e-9),  # without a default: the bound
    ],
)
def test_the_default_is_proposed_for_a_value_out_of_bounds(algorithm, field, value, proposed):
    c = ready(algorithm)
    c.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as raised:
        validate(c)
    assert raised.value.fix == f"--config.{field}={proposed}"


def test_trap_label_smoothing_is_an_error_where_the_loss_has_none():
    c = ready("dpo")
    c.algorithm.loss, c.algorithm.label_smoothing = "ipo", 0.1
    with pytest.raises(InputError, match=r"label_smoothing=0\.1 with the ipo loss"):
        validate(c)


@pytest.mark.parametrize(
    ("loss", "field", "value", "found", "proposed"),
    [
        ("sppo_hard", "label_smoothing", 0.1, "label_smoothing=0.1 with the sppo_hard loss", 0.0),
        ("sigmoid", "average", False, "average=False with the sigmoid loss", None),
        ("hinge", "discopop_tau", 0.5, "discopop_tau=0.5 with the hinge loss", 0.05),
        ("exo_pair", "label_smoothing", 0.0, "label_smoothing=0 with the exo_pair loss", 0.001),
    ],
)
def test_a_field_that_the_loss_does_not_read_or_needs(loss, field, value, found, proposed):
    c = ready("dpo")
    c.algorithm.loss, c.algorithm[field] = loss, value
    with pytest.raises(InputError, match=found) as raised:
        validate(c)
    assert raised.value.fix == f"--config.algorithm.{field}={proposed}"


@pytest.mark.parametrize(
    ("fields", "found", "fix"),
    [
        ({"loss": "simpo"}, "reference=live with the simpo loss", "reference=none"),
        ({"loss": "apo_zero", "reference": "none"}, "reference=none with the apo_zero loss", "reference=live"),
        ({"reference": "none", "reference_path": "x"}, "reference_path=x", "reference_path=None"),
        ({"extra_losses": ("sft",)}, "holds 'sft'", "extra_losses='"),
        ({"extra_losses": (("nll", 1.0),)}, "nll", "extra_losses='"),
        ({"extra_losses": (("sft", 0.0),)}, "0.0", "extra_losses='"),
        ({"extra_losses": (("sigmoid", 1.0),)}, "the sigmoid loss twice", "extra_losses='"),
        ({"simpo_gamma": 1.0, "extra_losses": (("sft", 1.0),)}, "with the sigmoid and sft loss", "simpo_gamma=0.5"),
    ],
)
def test_losses_that_do_not_go_together(fields, found, fix):
    c = ready("dpo")
    c.algorithm.update(fields)
    with pytest.raises(InputError, match=found) as raised:
        validate(c)
    assert raised.value.fix.startswith(f"--config.algorithm.{fix}")


def test_orpo_without_its_other_half_is_told():
    c = ready("dpo")
    c.algorithm.loss, c.algorithm.reference = "orpo", "none"
    assert any("extra_losses" in said for said in validate(c))
    c.algorithm.extra_losses = (("sft", 1.0),)
    assert not any("extra_losses" in said for said in validate(c))


@pytest.mark.parametrize(
    ("algorithm", "field", "value"),
    [
        ("dpo", "algorithm.beta", 0.01),
        ("dpo", "optimizer.learning_rate", 1e-4),
        ("ppo", "algorithm.clip_range", 0.4),
        ("sft", "optimizer.learning_rate", 1000.0),
        ("reward", "optimizer.learning_rate", 0.1),
        ("ppo", "optimizer.learning_rate", 1.0),
    ],
)
def test_values_outside_the_guides_ranges_warn(algorithm, field, value):
    c = ready(algorithm)
    c.update_from_flattened_dict({field: value})
    assert [w for w in validate(c) if w.startswith(field)]


def test_a_misspelt_field_is_refused_and_has_a_nearest_name():
    c = defaults("ppo")
    with pytest.raises(AttributeError):
        c.algorithm.kl_coeff = 0.1
    assert nearest_field(c, "algorithm.kl_coeff") == "algorithm.kl_coef"
    assert nearest_field(c, "lerning_rate") == "optimizer.learning_rate"


def test_an_algorithm_has_only_fields_that_it_reads():
    assert "beta" not in defaults("sft").algorithm
    assert "rewards" not in defaults("dpo")
    assert "value_learning_rate" not in defaults("sft").optimizer


def test_stages_keep_their_order():
    c = stages("runs/x", seed=3, sft=defaults("sft"), dpo=defaults("dpo"), again=defaults("sft"))
    assert c.stages == ("sft", "dpo", "again") and c.seed == 3


@pytest.mark.parametrize("section", ["data", "optimizer", "from", "checkpoint"])
@pytest.mark.parametrize("value", [None, 3, "x", (1,)])
def test_a_section_that_is_none_or_something_else(section, value):
    c = ready("sft")
    with c.ignore_type():
        c[section] = value
    with pytest.raises(InputError, match=f"{section} is ") as raised:
        validate(c)
    assert "section" in raised.value.expected


def test_fields_that_are_missing_or_of_another_section():
    c = ready("sft")
    with c.unlocked():
        del c.optimizer.b1
    with pytest.raises(InputError, match=r"no field optimizer\.b1"):
        validate(c)
    c = ready("sft")
    with c.unlocked():
        c.data.maxlength = 3
    with pytest.raises(InputError, match=r"no field data\.maxlength") as raised:
        validate(c)
    assert "data.max_length" in raised.value.expected
    c = ready("sft")
    c.batch_size = None
    with pytest.raises(InputError, match="batch_size is None"):
        validate(c)
    c = ready("sft")
    with c.ignore_type():
        c.data = {"sources": ("a",)}
    with pytest.raises(InputError, match=r"no field data\."):
        validate(c)


@pytest.mark.parametrize("algorithm", configuration.ALGORITHMS)
def test_the_name_of_another_algorithm_on_this_ones_fields(algorithm):
    for other in set(configuration.ALGORITHMS) - {algorithm}:
        c = ready(algorithm)
        c.algorithm.name = other
        with pytest.raises(InputError, match=f"fields are those of {algorithm}"):
            validate(c)


@pytest.mark.parametrize("stop", [(1.5,), (-1,), (True,), ("",), (None,), ([1],), (2**40,)])
def test_stop_tokens_are_ids_or_strings(stop):
    c = ready("dpo")
    c.rollout.stop = stop
    with pytest.raises(InputError, match=r"rollout\.stop"):
        validate(c)


@pytest.mark.parametrize(
    ("algorithm", "field", "value"),
    [
        ("sft", "eval.every", 5),
        ("sft", "optimizer.decay_mask", "all"),
        ("sft", "checkpoint.best_mode", "max"),
        ("sft", "model.frozen_dtype", "bfloat16"),
        ("ppo", "optimizer.final_fraction", 0.5),
        ("ppo", "algorithm.kl_horizon", 5),
        ("ppo", "data.packing", True),
        ("ppo", "data.row_length", 64),
    ],
)
def test_fields_that_nothing_reads_are_told(algorithm, field, value):
    c = ready(algorithm)
    c.update_from_flattened_dict({field: value})
    assert any(w.startswith(field) and "without effect" in w for w in validate(c))


def test_a_share_held_out_is_told_to_be_without_effect_beside_held_out_sources():
    c = ready("sft")
    c.data.eval_sources, c.data.eval_fraction = ("e.jsonl",), 0.1
    assert [w for w in validate(c) if "data.eval_fraction" in w]


def test_an_adaptive_kl_coefficient_cannot_start_at_zero():
    c = ready("ppo")
    c.algorithm.kl_target, c.algorithm.kl_coef = 1.0, 0.0
    with pytest.raises(InputError, match="kl_target"):
        validate(c)


def test_samples_longer_than_max_length_are_told():
    c = ready("dpo")
    c.rollout.max_new_tokens = 5000
    assert [w for w in validate(c) if "rollout.max_new_tokens" in w]


@pytest.mark.parametrize(
    "field, value",
    [
        ("workdir", "runs/x\0y"),
        ("data.cache_dir", "\ud83d"),
        ("data.sources", ("a\0.jsonl",)),
        ("data.sources", ({"path": "a.jsonl", "columns": {"prompt": "\ud83d"}},)),
        ("data.eval_sources", (len,)),
        ("rollout.stop", ("\ud83d",)),
    ],
)
def test_what_no_file_holds_and_no_path_can_bear_is_refused(field, value):
    c = ready("ppo")
    *parents, leaf = field.split(".")
    section = c[parents[0]] if parents else c
    section[leaf] = value
    with pytest.raises(InputError, match=field) as refused:
        validate(c)
    str(refused.value).encode()  # the message itself can be printed


@pytest.mark.parametrize("text", ["", " ", "\n"])
@pytest.mark.parametrize(
    "field, fix",
    [
        ("workdir", "--config.workdir=..."),
        ("model.path", "--config.model.path=..."),
        ("model.chat_template", "--config.model.chat_template=None"),
        ("algorithm.value_path", "--config.algorithm.value_path=None"),
        ("rewards.model", "--config.rewards.model=None"),
        ("from.reward", "--config.from.reward=None"),
        ("model.dtype", "--config.model.dtype=float32"),
    ],
)
def test_a_blank_is_no_value(field, fix, text):
    c = ready("ppo")
    section, _, leaf = field.rpartition(".")
    (c[section] if section else c)[leaf] = text
    with pytest.raises(InputError, match=field) as refused:
        validate(c)
    assert fix in refused.value.fix


def test_a_source_may_be_a_path_object():
    c = ready("sft")
    c.data.sources = (Path("data.jsonl"), {"path": Path("more.jsonl")})
    validate(c)
    assert to_dict(c)["data"]["sources"] == ["data.jsonl", {"path": "more.jsonl"}]


def test_a_run_is_validated_once(monkeypatch, tmp_path):
    """By whoever holds the configuration first: what is handed on is not checked again."""
    from jaxalign import config as module
    from jaxalign.pipeline import stages

    c = ready("dpo")
    (planned,) = stages.plan(c)
    assert planned.config is c and planned.checked.warnings == tuple(validate(c))
    checked = module.validated(c)
    monkeypatch.setattr(module, "validate", None)  # would fail if it were called
    assert stages.plan(checked)[0].checked is checked

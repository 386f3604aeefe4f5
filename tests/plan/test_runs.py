"""How long a whole run is: steps, evaluations and the reference's pass as training counts them."""

import types

import pytest

from jaxalign.config import defaults
from jaxalign.plan.assumed import AssumedData
from jaxalign.plan.runs import Length, length_of, run_of, together


def stage(algorithm="dpo", *, here=None, held_out=None, reference=False, **fields):
    c = defaults(algorithm)
    c.data.max_length, c.data.sources = 64, ("x",)
    for field, value in fields.items():
        section, _, leaf = field.rpartition("__")
        (c[section] if section else c)[leaf] = value
    data = lambda batches: types.SimpleNamespace(batches_per_epoch=batches) if batches else AssumedData(c)  # noqa: E731
    measured = held_out or (c.data.eval_fraction or None)
    steps = c.num_train_steps or (here or 1000) * c.num_epochs
    program = types.SimpleNamespace(reference=object() if reference else None)
    return types.SimpleNamespace(
        config=c, dataset=data(here), num_steps=steps, program=program,
        eval_dataset=data(held_out) if measured else None,
    )  # fmt: skip


def test_data_that_are_here_are_counted():
    found = length_of(stage(here=100, held_out=7, reference=True, num_epochs=3, eval__every=50))
    assert found == Length(300, 6, 7, 107)
    few = length_of(stage(here=100, held_out=7, num_train_steps=30, eval__num_batches=3))
    assert (few.steps, few.evaluations, few.held_out, few.reference) == (30, 1, 3, 0)


def test_data_that_are_not_here_leave_a_run_unknown_unless_its_steps_are_given():
    assert length_of(stage()).steps is None
    assert "--assume steps=N" in length_of(stage()).told[0]
    assert length_of(stage(num_train_steps=300)).steps == 300
    assert "not used" in length_of(stage(num_train_steps=300), steps=1000).told[0]
    found = length_of(stage(reference=True, data__eval_fraction=0.2, num_epochs=2, eval__every=100), steps=1000)
    assert found == Length(1000, 10, 125, 625)  # of 625 batches of records 125 are held out


def test_what_cannot_be_counted_is_said():
    found = length_of(stage(num_train_steps=300, data__eval_fraction=0.1, reference=True))
    assert found.held_out is None and found.reference is None
    assert len(found.told) == 2 and "eval.num_batches" in found.told[0]


def programs(**seconds):
    times = {"evaluation step": 0.0, "reference pass": 0.0, "train step": 1.0, "decode": 4.0}
    return [{"name": name, "times": times[name], "seconds": {"total": s}} for name, s in seconds.items()]


def test_a_run_is_steps_evaluations_and_the_references_pass():
    some = programs(**{"train step": 2.0, "evaluation step": 0.5, "reference pass": 1.0})
    run = run_of(Length(300, 6, 7, 107), some, {"price": 3.0}, 8)
    assert run["seconds"] == {"steps": 600.0, "evaluations": 21.0, "reference pass": 107.0, "total": 728.0}
    assert run["device_hours"] == pytest.approx(728 * 8 / 3600)
    assert run["price"] == pytest.approx(3 * run["device_hours"])
    assert [p["runs"] for p in some] == [300, 42, 107]


def test_ppo_samples_for_an_evaluation_as_for_a_step():
    some = programs(**{"decode": 0.25, "train step": 2.0})
    run = run_of(Length(10, 2, 3, 0), some, {}, 1)
    assert run["seconds"] == {"steps": 30.0, "evaluations": 6.0, "reference pass": 0.0, "total": 36.0}
    assert [p["runs"] for p in some] == [4 * 16, 10]


def test_stages_together():
    run = run_of(Length(10), programs(**{"train step": 2.0}), {"price": 1.0}, 1)
    both = together([run, run])
    assert both["seconds"]["total"] == 40.0 and both["price"] == pytest.approx(2 * run["price"])
    assert together([run, run_of(Length(None), [], {}, 1)]) is None

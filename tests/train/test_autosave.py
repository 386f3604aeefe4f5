"""A run that saves by the clock: when it does, that all processes agree, and that no number depends on it."""

import functools
import json

import jax
import numpy as np
import pytest
from loop_world import World

from jaxalign.config import validate
from jaxalign.train import autosave, loop
from jaxalign.train.autosave import Autosave


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.minutes = 0.0

    def __call__(self):
        return 60 * self.minutes


def saves(steps, minutes=30, at=(), against=lambda: ""):
    """The steps after which it saves, where `steps` are the minutes that each takes; `at`: other checkpoints."""
    clock, found = Clock(), []
    due = Autosave(minutes, 0, against, clock)
    for step, taken in enumerate(steps, 1):
        clock.minutes += taken
        if due.due(step):
            found.append(step)
        if step in at or step in found[-1:]:
            due.saved(step)
    return found


def test_it_saves_when_the_minutes_are_over():
    assert saves([10] * 8) == [3, 6]
    assert saves([45, 1, 1, 45]) == [1, 4]
    assert saves([10] * 8, at=(2,)) == [5, 8]  # another checkpoint counts as well
    assert saves([1000] * 3, minutes=0) == []


def test_what_is_against_it_is_said_once(capfd):
    reasons = iter(["no room", "no room", ""])
    assert saves([10] * 9, against=lambda: next(reasons)) == [9]
    assert capfd.readouterr().err == "warning: no room\n"


def test_several_processes_ask_each_other_rarely_and_save_in_time(monkeypatch):
    asked = []

    def on_main(call):
        asked.append(call)
        return json.loads(json.dumps(call()))

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(autosave, "on_main", on_main)
    (first, second) = saves([1 / 60] * 4000)  # a second each
    assert 1800 <= first <= 1801 and second - first <= 1801
    assert len(asked) < 60
    (first, *_) = saves([1 / 60] * 600 + [1 / 6] * 200)  # 20 minutes are left at a tenth of the pace
    assert 720 <= first <= 730


@pytest.fixture
def clock(monkeypatch):
    """Ten minutes a step."""
    told = Clock()
    monkeypatch.setattr(loop, "Autosave", functools.partial(Autosave, clock=told))
    return told


def made(world):
    return sorted(int(p.name) for p in world.directory.checkpoints.iterdir())


def test_a_killed_run_without_scheduled_checkpoints_resumes_bitwise(tmp_path, clock):
    def prepare(state, frozen, batch):
        clock.minutes += 10
        if dies and int(state.data_cursor) == 5:
            raise KeyboardInterrupt
        return state, [batch], {}

    dies = False
    whole = World(tmp_path / "whole", num_steps=8, prepare=prepare, checkpoint__every_minutes=0.0)
    expected, _ = whole.run()
    assert made(whole) == [8]
    dies = True
    killed = World(tmp_path / "killed", num_steps=8, prepare=prepare)  # every 30 minutes, by default
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert made(killed) == [3]
    dies = False
    state, _ = killed.run()
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_the_clock_saves_is_neither_evaluated_nor_the_best(tmp_path, clock):
    def prepare(state, frozen, batch):
        clock.minutes += 10
        return state, [batch], {}

    evaluated = []

    def evaluate(state):
        evaluated.append(int(state.data_cursor))
        return {"loss": 1.0 / evaluated[-1]}

    fields = {"eval__every": 4, "checkpoint__best_metric": "eval/loss", "checkpoint__keep": 9}
    world = World(tmp_path, num_steps=8, prepare=prepare, evaluate=evaluate, **fields)
    world.run()
    assert evaluated == [4, 8] and made(world) == [3, 4, 7, 8]


def test_its_bounds(tmp_path):
    c = World(tmp_path).config
    c.model.path, c.data.sources = "m", ("a.jsonl",)
    c.checkpoint.every_minutes = -1.0
    with pytest.raises(ValueError, match=r"checkpoint\.every_minutes"):
        validate(c)

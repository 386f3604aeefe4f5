"""The profile of a few steps: a trace on disk, a line for each phase, and nothing else of the run changed."""

import re

import numpy as np
import pytest
from loop_world import World

from jaxalign.train.interrupts import Interrupted
from jaxalign.train.profile import Profile


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("profile of", "  "))]


def test_phases_and_trace(tmp_path, capsys):
    plain = World(tmp_path / "plain", num_steps=6)
    expected, _ = plain.run()
    assert lines(capsys) == []

    world = World(tmp_path / "traced", num_steps=6)
    world.config.profile = 2
    state, _ = world.run()
    head, *phases = lines(capsys)
    assert re.match(r"profile of steps 3 to 4: [\d.]+ s a step; the trace is in .*traced/profile", head)
    names = [re.match(r"  (\S.*?)  ", line)[1] for line in phases]
    assert {"update", "prepare", "waiting for data", "figures and logs", "the rest"} == set(names)
    shares = [float(line.split()[-1].rstrip("%")) for line in phases]
    assert sum(shares) == pytest.approx(100, abs=0.5) and all(s >= 0 for s in shares)
    assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))
    np.testing.assert_array_equal(*(s.params["policy"]["norm"]["scale"] for s in (expected, state)))


def test_a_run_that_ends_early_ends_its_trace(tmp_path, capsys):
    world = World(tmp_path, num_steps=4)
    world.config.profile = 10
    world.run()
    assert lines(capsys)[0].startswith("profile of steps 3 to 4")


def test_a_run_that_is_stopped_ends_its_trace(tmp_path, capsys):
    """Else the next trace of the process cannot begin."""
    for name in ("a", "b"):
        world = World(tmp_path / name, num_steps=6, evaluate=lambda state: (_ for _ in ()).throw(Interrupted(1)))
        world.config.eval.every = 3
        world.config.profile = 10
        with pytest.raises(Interrupted):
            world.run()
        assert lines(capsys)[0].startswith("profile of steps 3 to 3")


def test_what_prepare_measures_is_shown_apart(tmp_path, capsys):
    world = World(tmp_path, num_steps=4, prepare=lambda state, frozen, batch: (state, [batch], {"time/decode": 1e-6}))
    world.config.profile = 1
    world.run()
    assert any(line.startswith("  prepare: decode") for line in lines(capsys))


def test_steps_are_counted_from_where_a_run_resumes(tmp_path, capsys):
    profile = Profile(type("Run", (), {"remote": False, "path": tmp_path}), 1, start=10)
    assert [i for i, _ in profile.over((i, None) for i in range(10, 15))] == [10, 11, 12, 13, 14]
    assert "steps 13 to 13" in lines(capsys)[0] and list((tmp_path / "profile").rglob("*.xplane.pb"))

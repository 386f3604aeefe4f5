"""A run that is killed or stopped, then started again, ends as if nothing had happened."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest
from run_child import finish, start, stories
from safetensors.numpy import load_file


def rows_of(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process, workdir, step):
    """Until the run has logged a step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.is_alive():
        path = workdir / "metrics.jsonl"
        if path.exists() and path.read_text().count('"step"') >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended or hangs before step {step}: status {process.exitcode}")


def same_export(a, b):
    one, other = (load_file(w / "export" / "model.safetensors") for w in (a, b))
    assert one.keys() == other.keys()
    return all(np.array_equal(one[k].view(np.uint32), other[k].view(np.uint32)) for k in one)


def same_metrics(a, b):
    """Rows but for what depends on the clock."""
    clock = ("time", "tokens_per_second", "mfu")
    rows = [
        [{k: v for k, v in row.items() if k not in clock and not k.startswith("time/")} for row in rows_of(w)]
        for w in (a, b)
    ]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
    return rows[0] == rows[1]


@pytest.fixture(scope="module")
def whole_run(shared, tmp_path_factory):
    """The directory of the uninterrupted run of an algorithm, made once."""
    made = {}

    def of(algorithm, name="adamw", **fields):
        if (key := (algorithm, name)) not in made:
            made[key] = tmp_path_factory.mktemp("whole") / algorithm
            assert finish(start(stories(shared, made[key], algorithm, optimizer__name=name, **fields))) == 0
        return made[key]

    return of


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "ppo"])
def test_trap_killed_and_resumed_is_bitwise_the_uninterrupted_run(algorithm, shared, whole_run, tmp_path):
    whole, killed = whole_run(algorithm), tmp_path / "killed"
    spec = stories(shared, killed, algorithm)
    step = random.SystemRandom().randint(3, 7)
    process = start(spec, pace=0.15)
    wait_for_step(process, killed, step)
    if algorithm == "sft":  # meanwhile another one is refused, and writes nothing
        os.kill(process.pid, signal.SIGSTOP)
        written = (killed / "metrics.jsonl").read_text()
        assert finish(start(spec, tmp_path / "never", expect="is in use")) == 0
        assert not (tmp_path / "never").exists() and (killed / "metrics.jsonl").read_text() == written
    process.kill()
    assert finish(process) == -signal.SIGKILL, f"killed at step {step}"
    assert not (killed / "DONE").exists()

    results = tmp_path / "results.json"
    assert finish(start(spec, results)) == 0
    assert same_export(whole, killed), f"killed at step {step}"
    assert same_metrics(whole, killed)
    assert json.loads(results.read_text())["num_compiles"] == 1  # a resumed run compiles once, too


def test_killed_during_a_save_goes_on_from_the_last_whole_checkpoint(shared, whole_run, tmp_path):
    """With an optimizer whose weights of the end are computed from those in training and its state."""
    fields = {"optimizer__schedule": "constant", "optimizer__learning_rate": 1e-3}
    whole, killed = whole_run("sft", "schedule_free", **fields), tmp_path / "killed"
    spec = stories(shared, killed, "sft", optimizer__name="schedule_free", **fields)
    assert finish(start(spec, die_renaming=4)) == -signal.SIGKILL
    left = sorted(p.name for p in (killed / "checkpoints").iterdir())
    assert any(name.startswith("4.") and "tmp" in name for name in left), left
    assert "2" in left and "4" not in left
    assert finish(start(spec)) == 0
    assert same_export(whole, killed) and same_metrics(whole, killed)
    assert not [p for p in (killed / "checkpoints").iterdir() if "tmp" in p.name]


def test_sigterm_saves_and_exits_143_and_the_run_goes_on(shared, whole_run, tmp_path):
    whole, stopped = whole_run("sft"), tmp_path / "stopped"
    spec = stories(shared, stopped, "sft", checkpoint__every=0)  # only the signal makes it save
    process = start(spec, pace=0.15)
    wait_for_step(process, stopped, 3)
    process.terminate()
    assert finish(process) == 143
    assert not (stopped / "DONE").exists()
    steps = [int(p.name) for p in (stopped / "checkpoints").iterdir()]
    assert len(steps) == 1 and rows_of(stopped)[-1]["step"] == steps[0]  # its own figures are written
    assert finish(start(spec)) == 0
    assert same_export(whole, stopped) and same_metrics(whole, stopped)

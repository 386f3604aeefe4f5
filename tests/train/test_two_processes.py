"""Two processes over localhost do what one does, and stop together."""

import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from run_child import finish, start, stories
from safetensors.numpy import load_file


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start_both(spec, results, **options):
    port = free_port()
    return [
        start(
            spec,
            results if i == 0 else None,
            devices=1,
            x64=True,
            env={
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
            },
            **options,
        )
        for i in range(2)
    ]


def test_two_processes_stop_together_go_on_and_equal_one(shared, tmp_path):
    doubles = {
        "model.dtype": "float64",
        "model.param_dtype": "float64",
        "num_train_steps": 5,
        "data.eval_fraction": 0.2,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    single = start(stories(shared, one, "dpo", **doubles), devices=2, x64=True)

    spec = stories(shared, two, "dpo", **doubles, checkpoint__every=0)
    pair = start_both(spec, None, pace=0.5)
    deadline = time.monotonic() + 200
    while not ((two / "metrics.jsonl").exists() and (two / "metrics.jsonl").read_text().count("\n") >= 1):
        assert all(p.is_alive() for p in pair) and time.monotonic() < deadline
        time.sleep(0.02)
    pair[1].terminate()  # one host is told; all of them save and end
    assert [finish(p) for p in pair] == [143, 143]
    saved = [int(p.name) for p in (two / "checkpoints").iterdir()]
    assert len(saved) == 1 and saved[0] < 5

    assert [finish(p) for p in start_both(spec, tmp_path / "results.json")] == [0, 0]
    assert finish(single) == 0
    a, b = (load_file(w / "export" / "model.safetensors") for w in (one, two))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-9, err_msg=name)
    rows = [[json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()] for w in (one, two)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]  # written by one process alone
    for r, s in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "eval/loss"):
            if name in r:
                np.testing.assert_allclose(r[name], s[name], rtol=1e-9, atol=1e-9, err_msg=name)
    assert json.loads((tmp_path / "results.json").read_text())["num_compiles"] == 1
    assert os.listdir(two / "checkpoints") == ["5"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_named_and_the_same_command_goes_on(lost, shared, tmp_path):
    workdir = tmp_path / "run"
    spec = stories(shared, workdir, "sft", process_timeout=6, checkpoint__every=1, num_train_steps=6)
    pair = start_both(spec, None, pace=0.3, stderr=str(tmp_path / "stderr"))
    deadline = time.monotonic() + 200
    while len([p for p in workdir.glob("checkpoints/*") if p.name.isdigit()]) == 0:
        assert all(p.is_alive() for p in pair) and time.monotonic() < deadline
        time.sleep(0.02)
    pair[lost].kill()
    left = pair[1 - lost]
    assert finish(left) not in (0, None)
    said = Path(f"{tmp_path}/stderr-{left.pid}").read_text()
    named = f"process 1 (pid {pair[1].pid} on" if lost else "process 0, which the others meet at (localhost:"
    assert f"lost: {named}" in said and "the same command" in said
    if lost == 0:
        return
    assert finish(left) == 1
    assert [finish(p) for p in start_both(spec, tmp_path / "results.json")] == [
        0,
        0,
    ]  # at once: the lock is a dead one's
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 6


@pytest.mark.parametrize("algorithm", ["sft", "reward", "ppo"])
def test_two_processes_equal_one(algorithm, shared, tmp_path):
    doubles = {"model.dtype": "float64", "model.param_dtype": "float64", "num_train_steps": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    single = start(stories(shared, one, algorithm, **doubles), devices=2, x64=True)
    waits = {"algorithm.offload": True} if algorithm == "ppo" else {}
    assert [finish(p) for p in start_both(stories(shared, two, algorithm, **doubles, **waits), None)] == [0, 0]
    assert finish(single) == 0
    a, b = (load_file(w / "export" / "model.safetensors") for w in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-9, err_msg=name)

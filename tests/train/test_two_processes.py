"""Two processes over localhost do what one does, and stop together."""

import json
import os
import socket
import time

import numpy as np
import pytest
from run_child import CONTEXT, finish, start, stories
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


def together(index, port, said, ready, pause):
    """One of two processes that ask each other for something, again and again."""
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.environ["XLA_FLAGS"] = ""
    os.environ |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }
    import jax.numpy as jnp
    from jax.experimental import multihost_utils

    from jaxalign.parallel.processes import initialize
    from jaxalign.parallel.watch import watched

    initialize(6)
    with watched(6):
        while True:
            multihost_utils.process_allgather(jnp.ones(3))
            ready.set()
            while pause.is_set():  # alive, and nothing is asked of the other
                time.sleep(0.1)
            time.sleep(0.02)


@pytest.mark.parametrize("lost, waits", [(0, False), (1, False), (1, True)])
def test_a_lost_process_is_named(lost, waits, tmp_path):
    port, ready, pause = free_port(), CONTEXT.Event(), CONTEXT.Event()
    said = [tmp_path / "0", tmp_path / "1"]
    pair = [CONTEXT.Process(target=together, args=(i, port, str(said[i]), ready, pause)) for i in range(2)]
    for process in pair:
        process.start()
    assert ready.wait(200)
    if waits:
        pause.set()
    pair[lost].kill()
    status = finish(pair[1 - lost])
    words = said[1 - lost].read_text()
    if lost == 0:  # the runtime ends the process, too: its words may come before ours are complete
        assert status != 0
        assert any(said in words for said in ("refuses connections", "does not answer", "another task"))
    else:
        assert status == 1 and f"lost: process 1 (pid {pair[1].pid} on " in words and "same command" in words


def test_a_run_that_lost_a_process_resumes(shared, tmp_path):
    """The other one ends, too; started again, both end as a run that lost nothing."""
    fields = {"num_train_steps": 6, "process_timeout": 6}
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    assert [finish(p) for p in start_both(stories(shared, whole, "sft", **fields), None)] == [0, 0]
    clock = {"checkpoint.every": 0, "checkpoint.every_minutes": 1e-3}  # saves by time alone
    spec = stories(shared, lost, "sft", **fields, **clock)
    pair = start_both(spec, None, pace=0.5)
    deadline = time.monotonic() + 200
    while not ((lost / "metrics.jsonl").exists() and (lost / "metrics.jsonl").read_text().count("\n") >= 3):
        assert all(p.is_alive() for p in pair) and time.monotonic() < deadline
        time.sleep(0.02)
    pair[1].kill()
    assert finish(pair[0]) == 1 and not (lost / "DONE").exists()
    assert [p for p in (lost / "checkpoints").iterdir() if p.name.isdigit()]
    assert [finish(p) for p in start_both(spec, None)] == [0, 0]
    a, b = (load_file(w / "export" / "model.safetensors") for w in (whole, lost))
    assert a.keys() == b.keys() and all((a[name].view(np.uint32) == b[name].view(np.uint32)).all() for name in a)


@pytest.mark.parametrize("algorithm", ["sft", "reward", "ppo"])
def test_two_processes_equal_one(algorithm, shared, tmp_path):
    doubles = {"model.dtype": "float64", "model.param_dtype": "float64", "num_train_steps": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    single = start(stories(shared, one, algorithm, **doubles), devices=2, x64=True)
    waits = {"algorithm.offload": True, "rollout.tensor": 2} if algorithm == "ppo" else {}
    assert [finish(p) for p in start_both(stories(shared, two, algorithm, **doubles, **waits), None)] == [0, 0]
    assert finish(single) == 0
    a, b = (load_file(w / "export" / "model.safetensors") for w in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-9, err_msg=name)

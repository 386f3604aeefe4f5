"""Ahead-of-time compilation, and what is said when memory is short."""

import jax
import jax.numpy as jnp
import pytest
from run_child import make_config, stories

from jaxalign.errors import InputError
from jaxalign.parallel.mesh import make_mesh
from jaxalign.train import compiled
from jaxalign.train.arguments import batch_of, step_arguments
from jaxalign.train.compiled import Compiled, memory_errors, out_of_memory, refuse_what_cannot_fit
from jaxalign.train.rundir import RunDir
from jaxalign.train.stage import Stage


def test_compiles_once_for_each_shape():
    f = Compiled(lambda x: x + 1, "f")
    for n in (2, 2, 3, 2, 3):
        assert float(f(jnp.zeros(n)).sum()) == n
    assert f.num_compiles == 2 and f.compile_seconds > 0
    assert f.memory["total"] > 0


def test_donates_what_it_is_told_to_and_nothing_else():
    f = Compiled(lambda state, frozen: state + frozen, "f", donate=(0,))
    state, frozen = jnp.ones(1024), jnp.ones(1024)
    out = f(state, frozen)
    assert float(out[0]) == 2 and float(frozen[0]) == 1
    with pytest.raises(RuntimeError, match="deleted"):
        state.block_until_ready()


def test_out_of_memory_says_bytes_needed_bytes_there_and_what_to_change(monkeypatch):
    memory = {"arguments": 6 * 2**30, "results": 0, "temporary": 4 * 2**30, "total": 10 * 2**30}
    with pytest.raises(InputError) as error:
        refuse_what_cannot_fit("train step", memory, limit=8 * 2**30)
    text = str(error.value)
    assert "10,737,418,240 bytes (10.00 GiB)" in text and "8,589,934,592 bytes (8.00 GiB) there" in text
    for change in ("grad_accum_steps", "remat", "max_length", "batch_size"):
        assert f"--config.{change}" in text or f".{change}" in text
    refuse_what_cannot_fit("train step", memory, limit=11 * 2**30)

    monkeypatch.setattr(compiled, "device_limit", lambda: 8 * 2**30)
    with pytest.raises(InputError, match="RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"):
        with memory_errors("rollout"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_errors("rollout"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(InputError, match="MemoryError"), memory_errors("rollout"):
        raise MemoryError
    assert "out of memory in the x" in str(out_of_memory("x", {}, None))


def test_a_step_that_cannot_fit_is_refused_before_it_runs(monkeypatch):
    monkeypatch.setattr(compiled, "device_limit", lambda: 1000)
    with pytest.raises(InputError, match="out of memory in the big step"):
        Compiled(lambda x: x @ x.T, "big step")(jnp.zeros((64, 64)))


def test_an_argument_that_is_given_twice_takes_memory_once():
    base = jnp.zeros((64, 64))
    f = Compiled(lambda state, frozen: state + frozen["policy"] @ frozen["ref"], "f", donate=(0,))
    f(jnp.zeros((64, 64)), {"policy": base, "ref": base})
    assert f.memory["arguments"] == 2 * base.nbytes
    assert f.memory["total"] == f.memory["arguments"] + f.memory["results"] + f.memory["temporary"]


def test_an_argument_that_nothing_reads_is_none_of_the_memory():
    base = jnp.zeros((64, 64))
    f = Compiled(lambda state, frozen: state + frozen["policy"], "f", donate=(0,))
    f(jnp.zeros((64, 64)), {"policy": base, "ref": base})
    assert f.memory["arguments"] == 2 * base.nbytes


def test_an_evaluation_takes_a_stage_s_batch_in_its_parts(shared, tmp_path):
    """What fits to train on fits to evaluate."""
    taken = {}
    for parts in (1, 4):
        more = {"grad_accum_steps": parts, "model.remat": "full", "data.eval_fraction": 0.2, "batch_size": 8}
        config = make_config(stories(shared, tmp_path / str(parts), "sft", **more))
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            stage = Stage(config, mesh, RunDir(config.workdir))
            _, frozen, batch = step_arguments(stage)
            stage.step.compile(stage.like, frozen, batch)
            stage.eval_step.compile(stage.like.params, frozen, stage.like.extra, batch_of(stage, stage.eval_dataset))
        taken[parts] = stage.step.memory, stage.eval_step.memory
    assert taken[4][1]["temporary"] < 0.5 * taken[1][1]["temporary"]
    assert taken[4][1]["total"] < taken[4][0]["total"]

"""Schedule-Free AdamW: the paper's loop, which of its three sequences is looked at, exports, resume."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file

from jaxalign.config import defaults, validate
from jaxalign.errors import InputError
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.pipeline.evaluate import evaluate
from jaxalign.pipeline.export import export
from jaxalign.steps.objective import Objective, Sums
from jaxalign.steps.step import make_train_step
from jaxalign.train import trainer
from jaxalign.train.optimizer import make_optimizer, updates_made
from jaxalign.train.schedule_free import evaluated
from jaxalign.types import TrainState

FIELDS = {
    "optimizer.name": "schedule_free",
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 2,
    "optimizer.weight_decay": 0.1,
}


def section(**fields):
    cfg = defaults("sft").unlock().optimizer
    cfg.name, cfg.schedule, cfg.warmup_steps, cfg.max_grad_norm = "schedule_free", "constant", 4, 0.0
    for name, value in fields.items():
        cfg[name] = value
    return cfg


def paper(x, gradient, steps, *, rate, warmup, b1, b2, eps, decay):
    """Algorithm 1 of arXiv 2405.15682 number by number, with Adam's bias correction in v: x and y at the end."""
    x = np.array(x, np.float64)
    z, v, weights = x.copy(), np.zeros_like(x), 0.0
    for t in range(1, steps + 1):
        y = (1 - b1) * z + b1 * x
        g = gradient(y, t)
        v = b2 * v + (1 - b2) * g**2
        now = rate * min(1.0, t / warmup)
        z = z - now * g / (np.sqrt(v / (1 - b2**t)) + eps) - now * decay * y
        weights += now**2
        c = now**2 / weights
        x = (1 - c) * x + c * z
    return x, (1 - b1) * z + b1 * x


def gradient(y, t):
    return np.sin(3 * y + t) + 0.3 * y


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-6)])
def test_steps_are_the_papers(dtype, tolerance):
    start = np.linspace(-1.0, 1.0, 12).reshape(3, 4)
    cfg = section(b1=0.9, b2=0.95, weight_decay=0.125)
    with jax.enable_x64(dtype == "float64"):
        tx = make_optimizer(cfg, 0.0625, 100)
        params = {"policy": {"embed": {"embedding": jnp.asarray(start, dtype)}, "norm": {"scale": jnp.ones(4, dtype)}}}
        state = TrainState(0, params, {"policy": tx.init(params["policy"])}, {}, 0)
        assert evaluated(state).params["policy"]["embed"]["embedding"] == pytest.approx(start, abs=tolerance)
        for t in range(1, 9):
            own = state.params["policy"]
            grads = jax.tree.map(lambda y, t=t: jnp.asarray(gradient(np.asarray(y, np.float64), t), dtype), own)
            updates, opt = tx.update(grads, state.opt["policy"], own)
            state = state._replace(params={"policy": jax.tree.map(jnp.add, own, updates)}, opt={"policy": opt})
        assert int(updates_made(state.opt["policy"])) == 8
        constants = {"rate": 0.0625, "warmup": 4, "b1": 0.9, "b2": 0.95, "eps": cfg.eps}
        for name, leaf, first, decay in (
            ("embed", "embedding", start, 0.125),
            ("norm", "scale", np.ones(4), 0.0),  # decay_mask=matrices
        ):
            x, y = paper(first, gradient, 8, decay=decay, **constants)
            np.testing.assert_allclose(state.params["policy"][name][leaf], y, rtol=0, atol=tolerance)
            np.testing.assert_allclose(evaluated(state).params["policy"][name][leaf], x, rtol=0, atol=tolerance)
            assert np.abs(x - y).max() > 1e-3


def test_rounding_does_not_add_up():
    """2,000 steps of a small learning rate in float32: x is off by a hundredth of its way, and not to one side."""
    start = np.random.default_rng(0).normal(size=4096)
    tx = make_optimizer(section(b1=0.9, b2=0.95, weight_decay=0.0), 1e-6, 2000)

    @jax.jit
    def run(y):
        def step(carry, t):
            y, opt = carry
            updates, opt = tx.update({"x": jnp.sin(3 * y["x"] + t) + 0.3 * y["x"]}, opt, y)
            return (jax.tree.map(jnp.add, y, updates), opt), None

        return jax.lax.scan(step, (y, tx.init(y)), jnp.arange(1.0, 2001))[0]

    y, opt = run({"x": jnp.asarray(start, jnp.float32)})
    found = np.asarray(evaluated(TrainState(0, {"p": y}, {"p": opt}, {}, 0)).params["p"]["x"], np.float64)
    constants = {"rate": 1e-6, "warmup": 4, "b1": 0.9, "b2": 0.95, "eps": section().eps, "decay": 0.0}
    wanted, _ = paper(start.astype(np.float32), gradient, 2000, **constants)
    off, way = found - wanted, np.abs(wanted - start).mean()
    assert np.abs(off).mean() < 0.02 * way
    assert abs((off * np.sign(start)).mean()) < 0.002 * way


def test_the_state_holds_z_and_one_moment_split_as_the_weights_are():
    p = {"embed": {"embedding": jnp.ones((64, 32))}, "norm": {"scale": jnp.ones(32)}}
    plain, small = (jax.eval_shape(make_optimizer(section(state_dtype=d), 0.05, 40).init, p) for d in (None, "int8"))
    assert 2 * num_bytes(p) < num_bytes(plain) < 2 * num_bytes(p) + 64
    assert num_bytes(small) < 1.35 * num_bytes(p)  # z in float32, the moment in 8 bits
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    places, of_weights = param_shardings(mesh, plain), param_shardings(mesh, p)
    z = [x for path, x in jax.tree_util.tree_flatten_with_path(places)[0] if ".z" in jax.tree_util.keystr(path)]
    assert z == jax.tree.leaves(of_weights)


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_skipped_updates_leave_the_average(state_dtype):
    """The step's own mask covers y, z and the average's weights; what is evaluated is split as y is."""
    terms = lambda params, frozen, extra, statistics, batch: Sums(  # noqa: E731
        {"policy": jnp.sum(batch) * jnp.sum(params["policy"]["embed"]["embedding"] ** 2)}
    )
    tx = make_optimizer(section(state_dtype=state_dtype), 0.05, 40)
    mesh = make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    params = {"policy": {"embed": {"embedding": jnp.linspace(0.0, 1.0, 64 * 32).reshape(64, 32)}}}
    params = jax.device_put(params, param_shardings(mesh, params))
    state = TrainState(jnp.int32(0), params, {"policy": tx.init(params["policy"])}, {}, jnp.int32(0))
    step = jax.jit(make_train_step(Objective(lambda batch: {"policy": jnp.float32(1)}, terms), {"policy": tx}))
    state, _ = step(state, {}, jnp.ones(8))
    same, metrics = step(state, {}, jnp.full(8, jnp.nan))
    assert float(metrics["skipped"]) == 1
    for part in ("params", "opt"):
        jax.tree.map(np.testing.assert_array_equal, *(getattr(evaluated(s), part) for s in (state, same)))
    found = evaluated(step(state, {}, jnp.ones(8))[0]).params["policy"]["embed"]["embedding"]
    assert found.sharding.is_equivalent_to(params["policy"]["embed"]["embedding"].sharding, 2)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"optimizer.schedule": "cosine"}, "optimizer.schedule"),
        ({"optimizer.b1": 0.0}, "optimizer.b1"),
        ({"optimizer.state_dtype": "bfloat16"}, "optimizer.state_dtype"),
        ({"model.param_dtype": "bfloat16"}, "model.param_dtype"),
    ],
)
def test_what_does_not_go_with_it_is_refused(fields, words):
    c = defaults("sft")
    c.workdir, c.model.path, c.data.sources = "w", "m", ("d",)
    for name, value in (FIELDS | fields).items():
        section, leaf = name.split(".")
        c[section][leaf] = value
    with pytest.raises(InputError, match=words) as error:
        validate(c)
    assert "schedule_free" in str(error.value) and words in error.value.fix


def train(shared, workdir, algorithm="sft", **fields):
    fields = {"checkpoint.every": 0, "data.max_length": 64, "data.max_records": 16} | FIELDS | fields
    return trainer.run(make_config(stories(shared, workdir, algorithm, **fields)), devices=jax.devices()[:1])


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_runs_resume_export_and_evaluate(shared, tmp_path):
    """A run in two parts is bitwise the whole one; its export is x, which is what its evaluations measured."""
    held_out = tmp_path / "held_out.jsonl"
    lines = (json.dumps({"text": f"Once upon a time, {i} cats sat on a mat."}) + "\n" for i in range(5))
    held_out.write_text("".join(lines))
    fields = {"eval.every": 2, "data.eval_sources": (str(held_out),), "optimizer.state_dtype": "int8"}
    fields |= {"checkpoint.every": 2, "checkpoint.keep": 9}
    train(shared, tmp_path / "run", **fields, num_train_steps=2)
    train(shared, tmp_path / "run", **fields, num_train_steps=4)
    done = train(shared, tmp_path / "whole", **fields, num_train_steps=4)
    x = weights(done["export"])
    assert same(weights(tmp_path / "run/export"), x)
    assert same(weights(export(str(tmp_path / "whole"), str(tmp_path / "x"), checkpoint="4")), x)
    earlier = export(str(tmp_path / "whole"), str(tmp_path / "earlier"), checkpoint="2")
    figures = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["eval/loss"] for row in figures if "eval/loss" in row}
    for directory, step in ((done["export"], 4), (str(earlier), 2)):
        found = evaluate(directory, str(held_out), flags=["--max_length=64", "--batch_size=8"])
        assert found["figures"]["loss"] == pytest.approx(measured[step], rel=1e-5)
    assert abs(measured[4] - measured[2]) > 1e-3


def test_ppo_samples_with_what_it_trains_and_exports_the_average(shared, tmp_path):
    """The first update is on the policy that sampled: its ratio is 1, although y and x have parted."""
    fields = {"num_train_steps": 2, "data.max_prompt_length": 40, "batch_size": 8}
    fields |= {"algorithm.num_ppo_epochs": 1, "algorithm.num_minibatches": 1, "logging.samples_every": 2}
    done = train(shared, tmp_path / "ppo", "ppo", **fields)
    assert done["steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert all(abs(row["policy/approxkl"]) < 1e-9 for row in rows if "policy/approxkl" in row)
    assert same(weights(export(str(tmp_path / "ppo"), str(tmp_path / "x"))), weights(done["export"]))

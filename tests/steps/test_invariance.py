"""Loss and gradient of every algorithm do not depend on layout, accumulation, rematerialisation or devices."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, put_batch
from jaxalign.steps.preference import preference_objective
from jaxalign.steps.reward import reward_objective
from jaxalign.steps.sft import sft_objective
from jaxalign.steps.step import make_train_step
from jaxalign.types import TrainState
from tests.steps.layouts import examples, lay, perturbed, tiny_model

ROWS = 8
ALGORITHMS = ("sft", "reward", "dpo", "ipo")
# LLVM's optimisations change nothing that these tests look at, and take half their time.
COMPILER = {"xla_backend_optimization_level": 0}


def objective(algorithm, model):
    if algorithm == "sft":
        return sft_objective(model.apply, model.head, entropy=True)
    if algorithm == "reward":
        return reward_objective(model.apply, model.score_kernel, label_smoothing=0.1, center_coef=0.01, use_margin=True)
    loss, smoothing = ("sigmoid", 0.1) if algorithm == "dpo" else ("ipo", 0.0)
    return preference_objective(
        model.apply, model.head, loss=loss, beta=0.3, label_smoothing=smoothing, reference="live"
    )


def role(algorithm):
    return "reward" if algorithm == "reward" else "policy"


@functools.cache
def world(algorithm):
    """The model's parameters and, for a preference loss, those of a reference."""
    with jax.enable_x64(True):
        model = tiny_model("score" if algorithm == "reward" else "lm")
        params = jax.jit(model.init, compiler_options=COMPILER)(jax.random.key(0))
        return params, {"ref": perturbed(params)}


def data(algorithm, *, packed=False, plan=None, **layout):
    """The same eight ragged, weighted examples in a layout; `packed` puts up to three in a row."""
    many = examples(ROWS, 1 if algorithm == "sft" else 2, weights=True)
    if plan is None:
        plan = [many[0:3], many[3:4], many[4:6], many[6:8]] if packed else [[e] for e in many]
    return lay(plan, num_rows=ROWS, scores=algorithm == "reward", dtype=np.float64, **{"m": 48, "width": 80} | layout)


@functools.cache
def jitted(algorithm, accum=1, remat="none"):
    """Gradients as the train step makes them: with plain descent at rate 1 the update is minus the gradient."""
    model = tiny_model("score" if algorithm == "reward" else "lm", remat=remat)
    step = make_train_step(objective(algorithm, model), {role(algorithm): optax.sgd(1.0)}, grad_accum_steps=accum)
    return jax.jit(step, compiler_options=COMPILER)


def result(algorithm, batch, *, accum=1, remat="none", mesh=None):
    """(metrics, gradients) of a step."""
    params, frozen = world(algorithm)
    if mesh is not None:
        params, frozen = (jax.device_put(x, param_shardings(mesh, x)) for x in (params, frozen))
        batch = put_batch(batch, mesh)
    state = TrainState(jnp.int32(0), {role(algorithm): params}, {role(algorithm): optax.sgd(1.0).init(params)}, {}, 0)
    state, metrics = jax.block_until_ready(jitted(algorithm, accum, remat)(state, frozen, batch))
    return metrics, jax.tree.map(lambda old, new: np.asarray(old - new), params, state.params[role(algorithm)])


@functools.cache
def expected(algorithm):
    with jax.enable_x64(True):
        return result(algorithm, data(algorithm))


def assert_same(found, algorithm):
    """Mean loss, metrics and gradients to 1e-9."""
    metrics, gradients = expected(algorithm)
    assert set(found[0]) == set(metrics)
    chex.assert_trees_all_close(found[0], metrics, rtol=1e-9, atol=1e-9)
    chex.assert_trees_all_close(found[1], gradients, rtol=1e-9, atol=1e-9)


def test_there_is_something_to_see(x64):
    """The gradients that are compared below are not zero, whatever the tensor."""
    for algorithm in ALGORITHMS:
        metrics, gradients = expected(algorithm)
        assert metrics["weight"] > 1
        assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(gradients))


LAYOUTS = {
    "left": {"side": "left"},
    "5 on the left, the rest on the right": {"side": 5},
    "pad id that is a real token, junk where masked": {"pad": 7, "junk": 3},
    "left, pad id, junk": {"side": "left", "pad": 2, "junk": 4},
    "packed": {"packed": True},
    "packed, left, junk": {"packed": True, "side": "left", "junk": 5},
}
PAIR_LAYOUTS = {
    "shared prompt": {"shared": True},
    "shared prompt, left, junk": {"shared": True, "side": "left", "pad": 3, "junk": 6},
    "shared prompt, packed": {"shared": True, "packed": True},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trap_layout_changes_nothing(algorithm, x64):
    """Padding's side, amount and id, packing, a shared prompt: one program, the same numbers."""
    for layout in (LAYOUTS | (PAIR_LAYOUTS if algorithm != "sft" else {})).values():
        assert_same(result(algorithm, data(algorithm, **layout)), algorithm)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12, deadline=None)
def test_any_plan_changes_nothing(draw):
    """Any order of the examples, in any rows, each with the prompt shared or not."""
    algorithm = draw.draw(st.sampled_from(ALGORITHMS))
    many = draw.draw(st.permutations(examples(ROWS, 1 if algorithm == "sft" else 2, weights=True)))
    plan, left = [], list(many)
    while left:
        size = draw.draw(st.integers(1, 2))
        plan, left = [*plan, left[:size]], left[size:]
    layout = {
        "side": draw.draw(st.sampled_from(["left", "right"])),
        "pad": draw.draw(st.integers(0, 31)),
        "junk": draw.draw(st.integers(0, 99)),
        "shared": algorithm != "sft" and draw.draw(st.booleans()),
    }
    with jax.enable_x64(True):
        assert_same(result(algorithm, data(algorithm, plan=plan, **layout)), algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_batch_of_padding_alone(algorithm, x64):
    """No loss, no weight, no gradient, nothing that is not a number; the junk in masked places notwithstanding."""
    metrics, gradients = result(algorithm, data(algorithm, plan=[], junk=8))
    assert metrics["weight"] == metrics["tokens"] == 0
    assert all(np.isfinite(x) for x in metrics.values())
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
    assert all((g == 0).all() for g in jax.tree.leaves(gradients))


def test_trap_width_of_rows_changes_nothing(x64):
    assert_same(result("sft", data("sft", width=33, m=16, c=2)), "sft")


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_trap_accumulation_changes_nothing(algorithm, x64):
    """Eight micro-batches of one row; the weights and lengths of the rows differ."""
    assert_same(result(algorithm, data(algorithm), accum=8), algorithm)


@pytest.mark.parametrize(("algorithm", "remat"), [("sft", "dots"), ("dpo", "full")])
def test_rematerialisation_changes_nothing(algorithm, remat, x64):
    assert_same(result(algorithm, data(algorithm), remat=remat), algorithm)


@pytest.mark.parametrize(
    ("algorithm", "axes", "accum"),
    [
        ("sft", (8, 1, 1), 1),
        ("reward", (1, 8, 1), 1),
        ("dpo", (1, 1, 8), 1),
        ("dpo", (2, 2, 2), 2),
    ],
)
def test_devices_change_nothing(algorithm, axes, accum, x64):
    """Whatever the mesh, micro-batches on top."""
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), axes, strict=True)))
    with jax.set_mesh(mesh):
        assert_same(result(algorithm, data(algorithm), accum=accum, mesh=mesh), algorithm)

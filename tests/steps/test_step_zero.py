"""Before the first update every implicit reward is exactly 0: policy and reference take the same path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.models.hf import load
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, put_batch
from jaxalign.steps.preference import preference_objective, sequence_logprobs
from jaxalign.steps.step import make_train_step
from jaxalign.types import TrainState
from tests.steps.layouts import examples, lay

TX = optax.sgd(1e-4)


def pairs(shared_prompt):
    many = examples(8, 2, prompt=(2, 20), completion=(1, 25), vocab=512)
    return lay([[e] for e in many], shared=shared_prompt, width=100, m=50, c=2)


def step_zero(model, params, batch, *, reference="live", accum=1, mesh=None, compiler=None):
    """Metrics of the first step; the reference is a copy of the policy, in buffers of its own."""
    objective = preference_objective(
        model.apply, model.head, loss="sigmoid", beta=0.1, label_smoothing=0.0, reference=reference
    )
    step = jax.jit(
        make_train_step(objective, {"policy": TX}, grad_accum_steps=accum), donate_argnums=0, compiler_options=compiler
    )
    if mesh is not None:
        params, batch = jax.device_put(params, param_shardings(mesh, params)), put_batch(batch, mesh)
    copy = jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.int32(0), {"policy": copy}, {"policy": TX.init(copy)}, {}, jnp.int32(0))
    return jax.block_until_ready(step(state, {"ref": params}, batch)[1])


def assert_exactly_zero(metrics):
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert metrics[name] == 0, (name, metrics[name])
    assert metrics["loss"] == np.float32(np.log(2))
    assert metrics["grad_norm"] > 1  # and still something is learned


def load_real(shared, remat="none", dtype="float32"):
    return load(shared / "models" / "stories260k-llama", dtype=dtype, param_dtype="float32", remat=remat)


@pytest.mark.parametrize(
    ("remat", "dtype", "accum"),
    [("none", "float32", 1), ("dots", "bfloat16", 1), ("full", "float32", 4)],
)
def test_trap_live_reference_on_a_real_model(shared, remat, dtype, accum):
    assert_exactly_zero(step_zero(*load_real(shared, remat, dtype), pairs(shared_prompt=True), accum=accum))


def test_trap_live_reference_sharded(shared):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model, params = load_real(shared, "full")
    with jax.set_mesh(mesh):
        assert_exactly_zero(step_zero(model, params, pairs(shared_prompt=False), mesh=mesh))


def test_trap_cached_reference_of_another_layout(shared):
    """Log-probs made ahead in plain causal rows, trained on in shared-prompt rows: at most 1e-3 nats."""
    model, params = load_real(shared)
    quick = {"xla_backend_optimization_level": 0}  # to compile; equality to the last bit is not asked for here
    log_probs = jax.jit(lambda p, b: sequence_logprobs(model.apply, model.head, p, b), compiler_options=quick)
    cached = log_probs(params, pairs(shared_prompt=False))
    batch = pairs(shared_prompt=True)
    batch = batch._replace(completions=batch.completions._replace(ref_logprob=np.asarray(cached)))
    metrics = step_zero(model, params, batch, reference="cached", compiler=quick)
    assert np.abs(cached).max() > 50
    assert abs(metrics["rewards/chosen"]) < 1e-3 * 0.1
    assert abs(metrics["rewards/rejected"]) < 1e-3 * 0.1
    np.testing.assert_allclose(metrics["logps/chosen"], np.mean(cached[:, 0]), rtol=1e-5)

"""Every algorithm's step on the same eight ragged, weighted examples, in any layout and on any mesh."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.parallel.sharding import param_shardings, put_batch, replicated
from jaxalign.steps.policy import policy_objective
from jaxalign.steps.preference import preference_objective
from jaxalign.steps.reward import reward_objective
from jaxalign.steps.sft import sft_objective
from jaxalign.steps.step import make_train_step
from jaxalign.types import PolicyBatch, TrainState
from tests.steps.layouts import examples, lay, perturbed, tiny_model

ROWS = 8
ALGORITHMS = ("sft", "reward", "dpo", "ipo", "orpo", "ppo")
PAIRED = ("reward", "dpo", "ipo", "orpo")
# Optimisations change nothing that these tests look at; without them a program compiles in a third of the time.
COMPILER = {"xla_backend_optimization_level": 0}
SGD = optax.sgd(1.0)  # the update is minus the gradient


def heads(algorithm):
    """The trained roles and what each reads out."""
    return {"reward": {"reward": "score"}, "ppo": {"policy": "lm", "value": "score"}}.get(algorithm, {"policy": "lm"})


def model(head, remat="none"):
    """Every dim is a multiple of eight, so that any axis of eight devices splits it; queries share keys in pairs."""
    return tiny_model(head, remat=remat, num_attention_heads=16, num_key_value_heads=8, head_dim=4)


def objective(algorithm, remat="none"):
    if algorithm == "reward":
        reward = model("score", remat)
        return reward_objective(
            reward.apply, reward.score_kernel, label_smoothing=0.1, center_coef=0.01, use_margin=True
        )
    policy = model("lm", remat)
    if algorithm == "sft":
        return sft_objective(policy.apply, policy.head, entropy=True)
    if algorithm == "ppo":
        value = model("score", remat)
        return policy_objective(
            policy.apply,
            policy.head,
            value.apply,
            value.score_kernel,
            temperature=0.7,
            clip_range=0.2,
            value_clip_range=0.2,
            vf_coef=0.1,
            entropy_coef=0.01,
        )
    if algorithm == "orpo":  # means over pairs and over tokens
        extra = (("sft", 1.0), ("hinge", 0.5))
        return preference_objective(
            policy.apply, policy.head, loss="orpo", beta=0.3, label_smoothing=0.0, reference="none", extra_losses=extra
        )
    loss, smoothing = ("sigmoid", 0.1) if algorithm == "dpo" else ("ipo", 0.0)
    return preference_objective(
        policy.apply, policy.head, loss=loss, beta=0.3, label_smoothing=smoothing, reference="live"
    )


def drawn(head, seed):
    """Parameters from numpy's generator: nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        return jnp.asarray(1 + 0.1 * noise if "scale" in str(path) else 0.3 * noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model(head).abstract())


@functools.cache
def start(algorithm):
    """The parameters by role, and the frozen ones."""
    with jax.enable_x64(True):
        params = {role: drawn(head, 5 + i) for i, (role, head) in enumerate(heads(algorithm).items())}
        return params, {"ref": perturbed(params["policy"])} if algorithm in ("dpo", "ipo") else {}


@functools.cache
def many(algorithm):
    """The eight examples."""
    return tuple(examples(ROWS, 2 if algorithm in PAIRED else 1, weights=True))


@functools.cache
def experience():
    """What PPO's collection says of each example's tokens: {id(example): {field: [its tokens]}}."""
    rng = np.random.default_rng(4)
    fields = {"old_logprobs": (-4, 1), "ref_logprobs": (-4, 1), "old_values": (0, 1), "advantages": (0, 1)}
    return {
        id(e): {k: rng.normal(*fields.get(k, (0.5, 1)), len(e.completions[0])) for k in PolicyBatch._fields[1:]}
        for e in many("ppo")
    }


def data(algorithm, *, packed=False, plan=None, **layout):
    """The examples in a layout; `packed` puts up to three in a row, `plan` says which are in which."""
    e = many(algorithm)
    if plan is None:
        plan = [e[0:3], e[3:4], e[4:6], e[6:8]] if packed else [[x] for x in e]
    layout = {"m": 48, "width": 80} | layout
    batch = lay(plan, num_rows=ROWS, scores=algorithm == "reward", dtype=np.float64, **layout)
    if algorithm != "ppo":
        return batch
    rng, values = np.random.default_rng(layout.get("junk")), {}
    for name in PolicyBatch._fields[1:]:
        values[name] = rng.normal(0, 9, (ROWS, layout["m"]))
        for i, row in enumerate(plan):
            for at, x in enumerate(np.concatenate([experience()[id(x)][name] for x in row])):
                values[name][i, at] = x
    return PolicyBatch(batch, **values)


def shardings(mesh, state):
    """Where a run keeps its state."""
    return jax.tree.map(lambda _: replicated(mesh), state)._replace(
        params=param_shardings(mesh, state.params), opt=param_shardings(mesh, state.opt)
    )


@functools.cache
def jitted(algorithm, accum=1, remat="none", mesh=None):
    optimizers = dict.fromkeys(heads(algorithm), SGD)
    step = make_train_step(objective(algorithm, remat), optimizers, grad_accum_steps=accum)
    out = None if mesh is None else (shardings(mesh, fresh(algorithm)), replicated(mesh))
    return jax.jit(step, out_shardings=out, compiler_options=COMPILER)


def fresh(algorithm):
    params = start(algorithm)[0]
    zero = jnp.int32(0)
    return TrainState(zero, params, {role: SGD.init(tree) for role, tree in params.items()}, {}, zero)


def result(algorithm, batch, *, accum=1, remat="none", mesh=None):
    """(metrics, gradients by role) of a step: with plain descent at rate 1 the update is minus the gradient."""
    state, frozen = fresh(algorithm), start(algorithm)[1]
    if mesh is not None:
        state = jax.device_put(state, shardings(mesh, state))
        frozen, batch = jax.device_put(frozen, param_shardings(mesh, frozen)), put_batch(batch, mesh)
    step = jitted(algorithm, accum, remat, mesh)
    # Waited for: programs of virtual devices that run side by side can starve each other's collectives.
    new, metrics = jax.block_until_ready(step(state, frozen, batch))
    return metrics, jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), state.params, new.params)


@functools.cache
def expected(algorithm):
    """On one device: a row for each example, padded on the right."""
    assert jax.sharding.get_abstract_mesh().empty  # under a mesh the program would be the mesh's
    with jax.enable_x64(True):
        return result(algorithm, data(algorithm))


def assert_same(found, algorithm):
    """Loss, metrics and gradients to 1e-9."""
    metrics, gradients = expected(algorithm)
    assert set(found[0]) == set(metrics)
    chex.assert_trees_all_close(found[0], metrics, rtol=1e-9, atol=1e-9)
    chex.assert_trees_all_close(found[1], gradients, rtol=1e-9, atol=1e-9)

"""A tiny policy, its prompts and everything that a PPO iteration needs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import config as configuration
from jaxalign.data.records import Record
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, put_batch, replicated
from jaxalign.rewards.function import FunctionScorer
from jaxalign.steps.policy import policy_objective, stop_on_kl
from jaxalign.steps.step import make_train_step
from jaxalign.train.experience import initial_extra, make_prepare
from jaxalign.types import SINGLE, Batch, Completions, Readouts, Rows, TrainState
from tests.steps import layouts

VOCAB, STOP = layouts.VOCAB, (3, 5)


def tiny_model(head="lm", dtype="float32", **fields):
    """A Llama of two layers."""
    return layouts.tiny_model(head, dtype, **fields)


def drawn(model, seed=0):
    """Parameters from numpy's generator: nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        return (1 + 0.1 * noise if "scale" in str(path) else 0.3 * noise).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.abstract())


def zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def prompt_batch(prompts, width, rows=None, pad=0):
    """Left-padded prompts as the data layer makes them; record i is prompt i."""
    rows = rows or len(prompts)
    index = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
    tokens, positions, start = np.full((rows, width), pad, np.int32), np.zeros((rows, width), np.int32), index.copy()
    for b, prompt in enumerate(prompts):
        first = width - len(prompt)
        tokens[b, first:], positions[b, first:], start[b, first:] = prompt, np.arange(len(prompt)), first
    used = (np.arange(rows) < len(prompts))[:, None]
    none = np.zeros((rows, 0), np.int32)
    return Batch(
        Rows(tokens, positions, start, index + 1),
        Readouts(none, none, none, none.astype(bool)),
        Completions(
            pair=np.zeros((rows, 1), np.int32),
            role=np.full((rows, 1), SINGLE, np.int32),
            weight=used.astype(np.float32),
            ref_logprob=np.zeros((rows, 1), np.float32),
            score=np.zeros((rows, 1), np.float32),
            mask=used,
        ),
        np.where(used, np.arange(rows, dtype=np.int32)[:, None], -1),
    )


class NumberTokenizer:
    """Writes tokens as numbers, of which every model's are some."""

    def get_vocab(self):
        return {"2147483646": 2147483646}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i in STOP))

    def batch_decode(self, sequences, skip_special_tokens=False):
        return [self.decode(ids, skip_special_tokens) for ids in sequences]


def record(i):
    return Record(i, "memory", i + 1, "prompt", prompt=f"prompt {i}", columns={"wanted": i % 2})


def ppo_config(**changes):
    """PPO's defaults at toy size; `algorithm.kl_coef=0.1` and the like as dotted names."""
    c = configuration.defaults("ppo").unlock()
    c.batch_size = 8
    c.rollout.max_new_tokens = 6
    for name, value in changes.items():
        node = c
        *parents, last = name.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return c


def world(reward, *, config=None, mesh=None, prompts=None, width=5, learning_rate=1e-2, dtype="float32", perturb=0.0):
    """A run in small: models, state, frozen parameters, prepare and step."""
    c = config or ppo_config()
    mesh = mesh or make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    policy, value = tiny_model(dtype=dtype), tiny_model("score", dtype=dtype)
    place = lambda tree: jax.device_put(tree, param_shardings(mesh, tree))  # noqa: E731
    ref = drawn(policy)
    start = jax.tree.map(lambda x, y: x + perturb * y, ref, drawn(policy, seed=7))
    params = {"policy": place(start), "value": place(drawn(value, seed=1))}
    optimizers = {"policy": optax.adam(learning_rate), "value": optax.adam(learning_rate)}
    whole = lambda tree: jax.device_put(tree, replicated(mesh))  # noqa: E731
    opt = {r: zeros(jax.eval_shape(t.init, params[r])) for r, t in optimizers.items()}  # Adam starts from zeros
    opt = {r: jax.device_put(o, param_shardings(mesh, o)) for r, o in opt.items()}
    state = TrainState(
        step=whole(jnp.int32(0)),
        params=params,
        opt=opt,
        extra=whole(initial_extra(c)),
        data_cursor=whole(jnp.int32(0)),
    )
    prompts = prompts or [[1, 7, 9], [1, 8], [1, 9, 10, 11], [1, 12, 13], [1, 14], [1, 15, 2], [1, 16, 17], [1, 18]]
    prepare = make_prepare(
        c,
        policy=policy,
        value=value,
        reward=FunctionScorer(reward) if callable(reward) and not hasattr(reward, "config") else reward,
        records=record,
        tokenizer=NumberTokenizer(),
        stop_ids=STOP,
        mesh=mesh,
    )
    a = c.algorithm
    objective = policy_objective(
        policy.apply,
        policy.head,
        value.apply,
        value.score_kernel,
        temperature=c.rollout.temperature,
        clip_range=a.clip_range,
        value_clip_range=a.value_clip_range,
        vf_coef=a.vf_coef,
        entropy_coef=a.entropy_coef,
    )
    early_stop = None if a.max_approx_kl is None else stop_on_kl(a.max_approx_kl)
    step = jax.jit(
        make_train_step(objective, optimizers, grad_accum_steps=c.grad_accum_steps, early_stop=early_stop),
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
    )
    return SimpleNamespace(
        config=c,
        mesh=mesh,
        policy=policy,
        value=value,
        state=state,
        frozen={"ref": place(ref)},
        prompts=prompts,
        batch=put_batch(prompt_batch(prompts, width, c.batch_size), mesh),
        prepare=prepare,
        objective=objective,
        step=step,
    )

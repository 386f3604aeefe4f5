"""The cases on which losses and gradients are compared with TRL: models, examples, and jaxalign's own results."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.hf import load
from jaxalign.steps.preference import preference_objective, sequence_logprobs
from jaxalign.steps.reward import completion_scores, reward_objective
from jaxalign.steps.sft import sft_objective
from jaxalign.steps.step import make_eval_step
from tests.steps.layouts import examples, lay, perturbed, tiny_model

MODELS = ("tiny", "stories260k-llama")
ALGORITHMS = ("sft", "sigmoid", "ipo", "reward")
BETA, CENTER = 0.3, 0.02
SMOOTHED = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 1e-3}}  # sigmoid's TRL ignores
GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "losses_trl.npz"


@functools.cache
def model_of(name, head, shared):
    """(model, params, reference params); the trained ones are a perturbed copy of the reference."""
    if name == "tiny":
        model = tiny_model(head, "float32")
        shapes, rng = model.abstract(), np.random.default_rng(5)  # numpy's numbers: the same for every version of jax
        params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)
        for norm in (params["norm"], params["layers"]["attention_norm"], params["layers"]["mlp_norm"]):
            norm["scale"] = 1 + norm["scale"]
    else:
        model, params = load(
            shared / "models" / name,
            dtype="float32",
            param_dtype="float32",
            remat="none",
            head=head,
            key=jax.random.key(0),
        )
        if head == "score":
            kernel = np.random.default_rng(6).standard_normal(params["score"]["kernel"].shape)
            params["score"]["kernel"] = jnp.asarray(kernel / np.sqrt(len(kernel) + 1), jnp.float32)
    return model, perturbed(params, scale=0.05), params


def head_of(algorithm):
    return "score" if algorithm == "reward" else "lm"


def examples_of(name, algorithm):
    """Seven ragged examples without the padding token; each reward pair has a margin."""
    size = {"prompt": (2, 9), "completion": (1, 12)} if name == "tiny" else {"prompt": (2, 40), "completion": (1, 60)}
    vocab = 32 if name == "tiny" else 512
    return examples(7, 1 if algorithm == "sft" else 2, seed=11, low=3, vocab=vocab, **size)


def objective_of(model, algorithm):
    if algorithm == "sft":
        return sft_objective(model.apply, model.head, entropy=True)
    if algorithm == "reward":
        return reward_objective(
            model.apply, model.score_kernel, label_smoothing=0.0, center_coef=CENTER, use_margin=True
        )
    return preference_objective(
        model.apply, model.head, loss=algorithm, beta=BETA, label_smoothing=0.0, reference="live"
    )


def ours(name, algorithm, shared):
    """{"loss", "items", "metrics/...", "gradient/<path>"}: items are log-probs, or scores, of the completions."""
    model, params, ref = model_of(name, head_of(algorithm), shared)
    longest = 60 if name == "tiny" else 170
    batch = lay(
        [[e] for e in examples_of(name, algorithm)],
        scores=algorithm == "reward",
        shared=algorithm != "sft",  # the layout that no peer has
        width=longest,
        m=2 if algorithm == "reward" else longest,
        c=2,
    )
    role, evaluate = ("reward" if algorithm == "reward" else "policy"), make_eval_step(objective_of(model, algorithm))

    def mean(params):
        metrics = evaluate({role: params}, {"ref": ref}, {}, batch)
        total, weight = metrics.pop("loss")
        return total / weight, metrics

    def everything(params):
        (loss, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(params)
        per_item = completion_scores if algorithm == "reward" else sequence_logprobs
        readout = model.score_kernel if algorithm == "reward" else model.head
        return loss, metrics, gradient, per_item(model.apply, readout, params, batch)

    # LLVM's optimisations are half the compile time, and nothing to the numbers compared here.
    compiled = jax.jit(everything, compiler_options={"xla_backend_optimization_level": 0})
    loss, metrics, gradient, items = compiled(params)
    out = {"loss": loss, "items": items[:, :1] if algorithm == "sft" else items}
    out |= {f"metrics/{metric}": total / weight for metric, (total, weight) in metrics.items()}
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        out["gradient/" + "/".join(k.key for k in path)] = leaf
    return {key: np.asarray(value) for key, value in out.items()}


def sketch(gradient, seed=9):
    """Sixteen random projections: their root mean square is, for a difference of gradients, close to its norm."""
    return np.random.default_rng(seed).standard_normal((16, gradient.size)) @ gradient.ravel().astype(np.float64)


def compare(found, peer):
    """Mean loss 1e-5 relative, items 1e-4, gradients 1e-4 by norm per tensor, metrics as the loss."""
    np.testing.assert_allclose(found["loss"], peer["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["items"], peer["items"], rtol=1e-4, atol=1e-4)
    for key in peer:
        kind, _, rest = key.partition("/")
        if kind == "metrics":
            np.testing.assert_allclose(found[key], peer[key], rtol=1e-4, atol=1e-4, err_msg=key)
        elif kind == "gradient":
            difference, norm = np.linalg.norm(found[key] - peer[key]), np.linalg.norm(peer[key])
            assert difference <= 1e-4 * norm, (key, difference / norm)
        elif kind == "sketch":
            difference = np.sqrt(np.mean(np.square(sketch(found["gradient/" + rest]) - peer[key])))
            norm = peer["norm/" + rest]
            assert difference <= 1e-4 * norm, (key, difference / norm)

"""bfloat16 against float32 on this device: log-probs, losses, gradients, and cached decoding against the forward."""

from part import MODELS, SMOKE, emit, guarded, model_of, stand_in_for_chex

stand_in_for_chex()

import dataclasses  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from batches import pairs, prompts, texts  # noqa: E402

from jaxalign.models.transformer import Model  # noqa: E402
from jaxalign.ops.readout import token_logprobs  # noqa: E402
from jaxalign.rollout.completed import completed_rows  # noqa: E402
from jaxalign.rollout.continuous import roll_out  # noqa: E402
from jaxalign.rollout.sampling import Sampling  # noqa: E402
from jaxalign.steps.preference import preference_objective  # noqa: E402
from jaxalign.steps.sft import sft_objective  # noqa: E402
from jaxalign.steps.step import make_eval_step  # noqa: E402

LAYERS, LENGTH = (1, 32) if SMOKE else (4, 512)
EPS = 2.0**-8  # bfloat16 rounds by up to this
# What rounding every activation may do, in parts of EPS; sums of such errors grow like the root of the layers.
LOSS, GRADIENT = 1.0, 16.0


def small(dtype: str) -> Model:
    """A few layers of the 1B shape."""
    return Model(dataclasses.replace(model_of("1B", dtype=dtype).config, num_layers=LAYERS))


def distance(a, b) -> float:
    """|a - b| / |b| over all leaves."""
    squares = [
        (np.sum((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2), np.sum(np.asarray(y, np.float64) ** 2))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return float(np.sqrt(sum(s[0] for s in squares) / sum(s[1] for s in squares)))


def check(case: str, found: float, most: float) -> None:
    emit(case, found, "relative", ok=bool(found <= most), note=f"at most {most:.1e}")


def losses_and_gradients(params) -> None:
    vocab = MODELS["1B"]["vocab_size"]
    batches = {
        "SFT, packed": texts(vocab, rows=2, length=LENGTH, parts=3),
        "DPO, shared prompt": pairs(vocab, rows=2, length=LENGTH, prompt=LENGTH // 2, shared=True),
        "DPO, prompt twice": pairs(vocab, rows=2, length=LENGTH, prompt=LENGTH // 2, shared=False),
    }
    other = jax.tree.map(lambda x: x * 1.02, params)
    found = {}
    for case, batch in batches.items():
        results = {}
        for dtype in ("float32", "bfloat16"):
            model = small(dtype)
            if case.startswith("SFT"):
                objective = sft_objective(model.apply, model.head)
            else:
                objective = preference_objective(
                    model.apply, model.head, loss="sigmoid", beta=0.1, label_smoothing=0.0, reference="live"
                )

            def loss(params, objective=objective, batch=batch):
                total, weight = make_eval_step(objective)({"policy": params}, {"ref": other}, {}, batch)["loss"]
                return total / weight

            with guarded(f"{case} in {dtype}", fails=True):
                results[dtype] = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
        if len(results) == 2:
            found[case] = results["float32"]
            check(f"{case}: loss", distance(results["bfloat16"][0], results["float32"][0]), LOSS * EPS)
            check(f"{case}: gradient", distance(results["bfloat16"][1], results["float32"][1]), GRADIENT * EPS)
    both = [found.get(f"DPO, {case}") for case in ("shared prompt", "prompt twice")]
    if None not in both:
        check("shared prompt against twice, float32: loss", distance(both[0][0], both[1][0]), 1e-4)
        check("shared prompt against twice, float32: gradient", distance(both[0][1], both[1][1]), 1e-3)


def decoding(params) -> None:
    """Log-probs of sampled tokens as the cached loop gives them, against one forward over what it made."""
    given = prompts(MODELS["1B"]["vocab_size"], rows=4, length=LENGTH // 2)
    for dtype in ("float32", "bfloat16"):
        with guarded(f"decoding in {dtype}", fails=True):
            model = small(dtype)
            options = {"sampling": Sampling(1.0, LENGTH // 8), "stop_ids": (-1,)}
            rollout, _ = roll_out(model, params, given.rows, jax.random.key(0), np.arange(4, dtype=np.int32), **options)
            rows, readouts = completed_rows(jax.device_put(given.rows), rollout)
            hidden = jax.jit(lambda p, r, model=model: model.apply(p, r)[0])(params, rows)
            whole = token_logprobs(hidden, model.head(params), readouts)[0]
            most = 1e-4 if dtype == "float32" else EPS
            check(f"decoding against the forward, {dtype}", distance(rollout.logprobs, whole), most)


if __name__ == "__main__":
    weights = jax.jit(small("float32").init)(jax.random.key(0))
    losses_and_gradients(weights)
    decoding(weights)

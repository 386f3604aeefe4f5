"""Logits, loss and gradients equal transformers', by the values that tests/oracle/test_models_*.py stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import hf
from jaxalign.ops.logits import logits
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES

SHARED_MODELS = ("stories3m-llama", "stories260k-llama")
FIXED_IDS = {
    "stories3m-llama": np.random.default_rng(0).integers(3, 4096, (2, 24)),
    "stories260k-llama": np.random.default_rng(0).integers(3, 512, (2, 24)),
    "tiny": np.random.default_rng(1).integers(3, 64, (2, 40)),
}


def loss_and_grads(model, params, tokens):
    """Mean next-token loss, logits [B, T, V], and the loss's gradients."""
    rows = tiny.causal(tokens)

    def loss(params):
        z = logits(model.apply(params, rows)[0], model.head(params))
        logprobs = jax.nn.log_softmax(z[:, :-1])
        targets = jnp.asarray(rows.tokens)[:, 1:, None]
        return -jnp.take_along_axis(logprobs, targets, axis=-1).mean(), z

    (value, z), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, np.asarray(z), grads


def projection(array: np.ndarray, name: str) -> float:
    """One number that moves with every element: the product with a vector drawn from the name."""
    seed = np.frombuffer(name.encode(), np.uint8)
    return float(np.random.default_rng(seed).normal(size=array.size) @ array.ravel().astype(np.float64))


def summary(loss, logits, grads) -> dict[str, np.ndarray]:
    """What a golden file holds: a slice of the logits, and the norm and a projection of each gradient."""
    keys = sorted(grads)
    return {
        "loss": np.float64(loss),
        "logits": logits[:, ::3, :: max(1, logits.shape[-1] // 64)],
        "names": np.array(keys),
        "norms": np.array([np.linalg.norm(grads[k].astype(np.float64)) for k in keys]),
        "projections": np.array([projection(grads[k], k) for k in keys]),
    }


def check_golden(model, params, tokens, stored):
    loss, logits, grads = loss_and_grads(model, params, tokens)
    assert float(loss) == pytest.approx(float(stored["loss"]), rel=1e-5)
    np.testing.assert_allclose(summary(loss, logits, {})["logits"], stored["logits"], rtol=0, atol=1e-4)
    by_name = tiny.by_name(model.config, grads)
    for name, norm, along in zip(stored["names"], stored["norms"], stored["projections"], strict=True):
        grad = by_name[str(name)]
        if not norm:
            assert np.linalg.norm(grad) <= 1e-7 * stored["norms"].max(), name
            continue
        assert np.linalg.norm(grad) == pytest.approx(norm, rel=1e-4), name
        assert abs(projection(grad, str(name)) - along) < 4e-4 * norm, name  # the projection's own spread is one norm


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_shared_model(shared, name):
    model, params = hf.load(shared / "models" / name, **tiny.SETTINGS)
    check_golden(model, params, FIXED_IDS[name], tiny.golden(name))


_TINY = {name: tiny.hf_config(**changes) for name, changes in tiny.VARIANTS.items()} | CASES


@pytest.mark.parametrize("variant", _TINY)
def test_variant(tmp_path, variant):
    config = _TINY[variant]
    model, params = hf.load(tiny.write(tmp_path / "m", config, tiny.tensors(config)), **tiny.SETTINGS)
    check_golden(model, params, FIXED_IDS["tiny"], tiny.golden(f"tiny_{variant}"))

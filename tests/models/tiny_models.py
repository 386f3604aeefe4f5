"""Small Llama checkpoints with weights from numpy, the same on every machine, and rows to run them on."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxalign.models import hf_names, weights
from jaxalign.models.cache import Cache
from jaxalign.models.config import ModelConfig, from_hf
from jaxalign.models.transformer import Model
from jaxalign.types import Rows

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SETTINGS = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "rope_length": 40}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Changes to `hf_config` that reach every branch of the architecture.
VARIANTS = {
    "biases_linear": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "one_key_llama3": {"rope_parameters": _LLAMA3, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "all_keys_tied": {"num_key_value_heads": 4, "head_dim": 12, "rms_norm_eps": 1e-3},
}


def hf_config(**changes) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "use_cache": True,
        "dtype": "float32",
        "transformers_version": "5.23.0",
    } | changes


def model(**changes) -> Model:
    settings = SETTINGS | {k: changes.pop(k) for k in ("dtype", "param_dtype", "remat", "head") if k in changes}
    return Model(from_hf(hf_config(**changes), **settings))


def tensors(hf: dict, head: str | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by Hugging Face name, large enough that every one of them shows in the output."""
    config = from_hf(hf, head=head, **SETTINGS)
    rng = np.random.default_rng(seed)
    shapes = {"/".join(k.key for k in p): x.shape for p, x in _flat(Model(config).abstract())}
    out = {}
    for row in config.family.names.rows:
        if row.path in shapes and row == (fused := config.family.names.fused_of(row)).rows[0]:
            for layer in range(config.num_layers if row.stacked else 1):
                shape = fused.shape(hf_names.sizes(config))
                value = rng.normal(size=shape).astype(np.float32)
                scale = 0.02 if row.path.endswith("embedding") else 0.3
                one = 1 - (config.norm_offset or 0)
                is_scale = "norm" in row.path and row.path.endswith("scale")
                out[row.named((layer,))] = one + 0.1 * value if is_scale else scale * value
    return out


def by_name(config: ModelConfig, tree) -> dict[str, np.ndarray]:
    """A tree of parameters, or of their gradients, by Hugging Face name."""
    names, sizes, out = config.family.names, hf_names.sizes(config), {}
    leaves = {"/".join(k.key for k in p): np.asarray(x) for p, x in _flat(tree)}
    for fused, index in names.in_order({path: x.shape for path, x in leaves.items()}):
        parts = [row.to_theirs(leaves[row.path][index], sizes) for row in fused.rows]
        out[fused.rows[0].named(index)] = fused.whole(parts, sizes)
    return out


def write(directory: Path, hf: dict, tree: dict[str, np.ndarray], dtype=np.float32, max_bytes=10**9) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    planned = {k: weights.Planned(v.shape, lambda v=v: v) for k, v in tree.items()}
    weights.write_tensors(directory, planned, np.dtype(dtype), max_bytes)
    return directory


def causal(tokens, pad_left=0, pad_right=0, pad_id=0) -> Rows:
    """A batch of equally long rows with padding on either side; a padding token sees itself."""
    tokens = np.asarray(tokens, np.int32)
    B, n = tokens.shape
    T = pad_left + n + pad_right
    slot = np.arange(T)
    real = (slot >= pad_left) & (slot < pad_left + n)
    out = np.full((B, T), pad_id, np.int32)
    out[:, real] = tokens
    positions = np.where(real, slot - pad_left, 0)
    start = np.where(real, pad_left, slot)
    return Rows(out, *(np.broadcast_to(x, (B, T)).astype(np.int32) for x in (positions, start, slot + 1)))


def _flat(tree):
    import jax

    return jax.tree_util.tree_flatten_with_path(tree)[0]


def golden(name: str, make=None) -> dict[str, np.ndarray]:
    """Stored values of an oracle; `make()` writes them where JAXALIGN_UPDATE_GOLDEN=1."""
    file = GOLDEN / f"model_{name}.npz"
    if make is not None and os.environ.get("JAXALIGN_UPDATE_GOLDEN") == "1":
        np.savez_compressed(file, **make())
    with np.load(file) as stored:
        return dict(stored)


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """Of the compute dtype, before any token."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    keys, values = (tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)) for _ in range(2))
    return Cache(keys, values, jnp.int32(0))

"""What every part of gpu.py stands on: its arguments, rows of the table, clocks, shapes of models, imports.

Imported first by each part, before jax.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]
OPTIONS: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
SMOKE: bool = OPTIONS.get("smoke", False)
_END = time.monotonic() + OPTIONS.get("seconds", 60.0)
# Filled by the part `ceilings`: FLOP/s of bfloat16 products, bytes/s of a copy (read plus written).
CEILINGS: dict[str, float] = OPTIONS.get("ceilings", {})

if OPTIONS.get("platform"):
    os.environ["JAX_PLATFORMS"] = OPTIONS["platform"]
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # an 8B model with its optimizer nearly fills the card
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if SMOKE:  # hundreds of programs are compiled, to run once
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "vocab_size": 128_256}
# config.json of the real models, as far as shapes go.
MODELS: dict[str, dict[str, Any]] = {
    "1B": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
    | {"rope_parameters": _LLAMA3_ROPE | {"factor": 32.0}, "max_position_embeddings": 131_072},
    "8B": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
    | {"rope_parameters": _LLAMA3_ROPE | {"factor": 8.0}, "max_position_embeddings": 131_072},
}
if SMOKE:
    for _name, _layers in (("1B", 1), ("8B", 2)):
        MODELS[_name] = MODELS[_name] | {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": _layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 256,
        }


def need(*modules: str) -> None:
    """Ends this part, with words, where a module is not there."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        emit("all of it", note=f"left out: no {', '.join(missing)} here")
        sys.exit(0)


def stand_in_for_chex() -> None:
    """Where there is no chex, its assertions of shapes pass unseen; nothing else of it is used."""
    import bare

    if bare.MISSING:
        emit("chex", note="not here: assertions of shapes are not checked")


def emit(case: str, figure: float | None = None, unit: str = "", **more: Any) -> None:
    """A row of the table.

    Args:
      case: what was measured.
      figure: the result, in `unit`; None where there is none, and `note` says why.
      unit: of the figure.
      more: `tflops` (FLOP/s / 1e12), `share` (of the ceiling or the floor, 1 is all of it), `gib` (memory), `ok`
        (False fails the run), `note`, and anything that only JSON shall have.
    """
    print("ROW " + json.dumps({"case": case, "figure": figure, "unit": unit} | more), flush=True)


@contextlib.contextmanager
def guarded(case: str, fails: bool = False) -> Iterator[None]:
    """A failure inside becomes a row with its reason, and the part goes on.

    Args:
      case: the row's name.
      fails: whether such a failure fails the run: it is a mistake and no lack of memory.
    """
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        more = {"ok": False} if fails else {}
        emit(case, note=f"{type(error).__name__}: {lines[0][:160]}", **more)
        if SMOKE:
            raise


def left() -> float:
    """Seconds left to this part."""
    return _END - time.monotonic()


def time_for(case: str, seconds: float) -> bool:
    """Whether `seconds` are left; where not, a row says so."""
    if SMOKE or left() >= seconds:
        return True
    emit(case, note=f"no time: {left():.0f} s left of its part, about {seconds:.0f} needed")
    return False


def seconds_of(run: Callable[[], Any], wait: Callable[[Any], Any], *, at_most: float = 4.0, calls: int = 12) -> float:
    """Median seconds of a call, after one that is not counted; at least three, or two where they are long."""
    wait(run())
    taken: list[float] = []
    end = time.perf_counter() + (0.1 if SMOKE else min(at_most, max(left() / 3, 0.5)))
    while len(taken) < 2 or (len(taken) < calls and time.perf_counter() < end):
        start = time.perf_counter()
        wait(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def share(tflops: float) -> float | None:
    """Of the measured matrix ceiling."""
    return tflops * 1e12 / CEILINGS["flops"] if CEILINGS.get("flops") else None


def peak_gib() -> float | None:
    """The most bytes in use on the GPU since this part began; None where the platform does not say."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if stats.get("peak_bytes_in_use") else None


def model_of(name: str, **options: Any) -> Any:
    """A jaxalign Model of one of `MODELS`."""
    from jaxalign.models.config import from_hf
    from jaxalign.models.transformer import Model

    return Model(from_hf(MODELS[name], **({"dtype": "bfloat16", "param_dtype": "float32", "remat": "none"} | options)))


def random_weights(abstract: Any) -> Any:
    """Weights for speed: a matrix of small numbers that differ, a norm of ones; quick to compile and to make.

    Args:
      abstract: shapes and dtypes, as `Model.abstract` gives them.
    """
    import functools

    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def matrix(shape, dtype):
        last = jax.lax.broadcasted_iota(jnp.float32, shape, len(shape) - 1)
        rest = sum(jax.lax.broadcasted_iota(jnp.float32, shape, i) * (i + 1.7) for i in range(len(shape) - 1))
        return (0.03 * jnp.sin(12.9898 * last + 78.233 * rest)).astype(dtype)

    def leaf(path, x):
        return jnp.ones(x.shape, x.dtype) if path[-1].key == "scale" else matrix(x.shape, jnp.dtype(x.dtype))

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def shape_of(name: str) -> Any:
    """The same as the benchmarks' `Shape`, which counts FLOPs."""
    from harness.cases import Shape

    m = MODELS[name]
    return Shape(
        hidden=m["hidden_size"],
        layers=m["num_hidden_layers"],
        heads=m["num_attention_heads"],
        kv_heads=m["num_key_value_heads"],
        ffn=m["intermediate_size"],
        vocab=m["vocab_size"],
    )

"""What decoding reads less since the cache of a layer with a window keeps the window's columns alone, in a ring.

python tests/benchmarks/windows.py             bytes of a token by counting, at the shapes of published models; then
                                               time on a CPU, against caches that keep all columns
python tests/benchmarks/windows.py --smoke     toy size
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from harness.in_turns import against, in_turns, median

from jaxalign.models.cache import Cache, in_ring
from jaxalign.models.config import ModelConfig, from_hf
from jaxalign.models.schedule import split_layers
from jaxalign.models.transformer import Model
from jaxalign.parallel import startup
from jaxalign.types import Rows

# Layers, hidden, mlp, heads, key heads, head dim, vocabulary, tied, window, one of so many layers has none.
MODELS = {
    "Gemma 3 1B": (26, 1152, 6912, 4, 1, 256, 262_144, 512, 6),
    "Gemma 3 4B": (34, 2560, 10_240, 8, 4, 256, 262_208, 1024, 6),
    "Gemma 3 27B": (62, 5376, 21_504, 32, 16, 128, 262_208, 1024, 6),
    "Gemma 2 9B": (42, 3584, 14_336, 16, 8, 256, 256_000, 4096, 2),
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--slots", default="16,64", help="completions at a time")
    parser.add_argument("--columns", default="2048,4096,8192", help="prompt and completion together")
    parser.add_argument("--window", type=int, default=512, help="of the model whose time is taken")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="toy size, one round")
    args = parser.parse_args()
    if args.smoke:
        args.columns, args.window, args.rounds = "256", 32, 1
    return args


def count(name: str, slots: int, columns: int) -> str:
    """Bytes that a step of decoding reads in 16 bits when the cache is full, and the share that a window saves."""
    layers, hidden, mlp, heads, kv_heads, head_dim, vocab, window, every = MODELS[name]
    of_layer = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * mlp
    weights = 2 * (layers * of_layer + vocab * hidden)
    of_column = 2 * 2 * kv_heads * head_dim
    cache, local = slots * layers * columns * of_column, layers - layers // every
    saved = slots * local * max(columns - window, 0) * of_column
    shares = f"{saved / cache:.0%} of the cache, {saved / (weights + cache):.0%} of all"
    return (
        f"{name}, {slots} slots, {columns} columns: weights {weights / 1e9:.1f} GB, cache {cache / 1e9:.1f}, of which "
        f"the window leaves out {saved / 1e9:.1f}: {shares}"
    )


def config(columns: int, window: int, smoke: bool) -> ModelConfig:
    """A Gemma 3 of six layers, one of them without a window."""
    size = 32 if smoke else 512
    fields = {"model_type": "gemma3_text", "vocab_size": 256, "hidden_size": size, "intermediate_size": 3 * size}
    fields |= {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": size // 4}
    fields |= {"rms_norm_eps": 1e-6, "sliding_window": window, "initializer_range": 0.1}
    return from_hf(fields, dtype="float32", param_dtype="float32", remat="none")


def make_step(config: ModelConfig):
    """A token of each slot: (parameters, cache) -> hidden states and the cache."""

    def step(params, cache):
        ones, at = jnp.ones((cache.keys[0].shape[0], 1), jnp.int32), cache.index
        rows = Rows(tokens=3 * ones, positions=at * ones, attend_start=0 * ones, attend_end=(at + 1) * ones)
        return Model(config).apply(params, rows, cache)[:2]

    return jax.jit(step, donate_argnums=(1,))


def caches(config: ModelConfig, slots: int, columns: int) -> dict[bool, Cache]:
    """The same keys and values in order, up to the last columns, and with rings."""
    rng, at = np.random.default_rng(0), columns - columns // 8
    shape = (slots, config.num_kv_heads, columns, config.head_dim)
    kept = [[rng.normal(size=shape).astype(np.float32) for _ in config.windows] for _ in range(2)]

    def ring(x, window):
        return x if window is None else in_ring(jnp.asarray(x[:, :, :at]), at, window)

    rings = [[ring(x, window) for x, window in zip(each, config.windows, strict=True)] for each in kept]
    put = lambda each: tuple(map(jnp.asarray, each))  # noqa: E731
    return {False: Cache(*map(put, kept), jnp.int32(at)), True: Cache(*map(put, rings), jnp.int32(at))}


def measure(slots: int, columns: int, args: argparse.Namespace) -> None:
    """Prints how long a token takes with both caches."""
    c = config(columns, args.window, args.smoke)
    params = jax.jit(Model(c).init)(jax.random.key(0))
    params |= {"layers": split_layers(params["layers"], c.num_layers)}
    held, step, hidden = caches(c, slots, columns), make_step(c), {}

    def advance(ring: bool) -> None:
        for _ in range(8):
            hidden[ring], held[ring] = step(params, held[ring])
        jax.block_until_ready(held[ring])

    names = {"in order": lambda: advance(False), "ring": lambda: advance(True)}
    room = columns // 8 // 8 - 1  # calls until the cache is full
    taken = in_turns(names, min(args.rounds, room - 1))
    np.testing.assert_allclose(hidden[True], hidden[False], rtol=1e-3, atol=1e-4)
    in_order, ring = (1000 * median(taken[name]).cpu / 8 for name in names)
    print(
        f"CPU, hidden {c.embed_dim}, 6 layers, 5 with a window of {args.window}, {slots} slots, {columns} columns: "
        f"{in_order:.1f} CPU ms a token, in a ring {ring:.1f}: {against(taken['ring'], taken['in order'])}",
        flush=True,
    )


def main() -> int:
    """Counts, then measures."""
    args = parse()
    startup.start()
    slots, columns = ([int(n) for n in each.split(",")] for each in (args.slots, args.columns))
    for name in MODELS:
        for n in slots:
            for width in columns:
                print(count(name, n, width))
    for width in columns[:1] if args.smoke else columns[:2]:
        measure(slots[0], width, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

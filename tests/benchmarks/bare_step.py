"""The SFT step against the same step without attention, norms, rotations and activations, in turns in one process.

    python tests/benchmarks/bare_step.py            hidden 512, 8 layers, 8 rows of 256 tokens; about two minutes
    python tests/benchmarks/bare_step.py --rounds 9 --rows 4 --length 512
    python tests/benchmarks/bare_step.py --smoke    toy size

What is left out is replaced by sums, so that every product with weights is still due, forward and backward: they
are counted. The ratio says what all else costs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import statistics
import sys
import time
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from gpu_parts.batches import texts

from jaxalign.config import defaults
from jaxalign.models import transformer
from jaxalign.models.config import from_hf
from jaxalign.parallel import startup
from jaxalign.steps.sft import sft_objective
from jaxalign.steps.step import make_train_step
from jaxalign.train.compiled import Compiled
from jaxalign.train.optimizer import make_optimizer
from jaxalign.types import TrainState

# A file that an older tree lacks is passed over, so that this script times that tree too.
FILES = [f"jaxalign.models.{name}" for name in ("transformer", "mlp", "norm")]
MODULES = [importlib.import_module(name) for name in FILES if importlib.util.find_spec(name)]
REPLACED = {  # no two terms alike: of equal gradients the compiler would make one product where several are due
    "attention": lambda q, k, v, **options: q + 2 * k + 3 * v,
    "rms_norm": lambda x, scale, eps: x,
    "rotate": lambda x, cos, sin: x,
    "swiglu": lambda gate, up: gate + 2 * up,
}


@contextlib.contextmanager
def left_out():
    """Within it the model lacks what `REPLACED` names, in each of its files that has the name."""
    with contextlib.ExitStack() as stack:
        for name, term in REPLACED.items():
            holders = [module for module in MODULES if hasattr(module, name)]
            assert holders, f"no file of the model has {name}: look for its new name"
            for module in holders:
                stack.enter_context(mock.patch.object(module, name, term))
        yield


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, value in {"hidden": 512, "layers": 8, "heads": 8, "ffn": 1376, "vocab": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="toy size, one round")
    args = parser.parse_args()
    if args.smoke:
        args.hidden, args.layers, args.heads, args.ffn, args.vocab = 32, 2, 2, 64, 128
        args.rows, args.length, args.rounds = 2, 128, 1
    return args


def make_step(args: argparse.Namespace):
    """A compiled step and its state."""
    described = {
        "model_type": "llama",
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    config = from_hf(described, dtype="float32", param_dtype="float32", remat="none")
    model = transformer.Model(config)
    tx = make_optimizer(defaults("sft").optimizer, 1e-4, 1000)
    step = make_train_step(sft_objective(model.apply, model.head), {"policy": tx})
    params = jax.jit(model.init)(jax.random.key(0))
    state = TrainState(jnp.int32(0), {"policy": params}, {"policy": jax.jit(tx.init)(params)}, {}, jnp.int32(0))
    batch = jax.tree.map(jnp.asarray, texts(args.vocab, rows=args.rows, length=args.length))
    compiled = Compiled(step, "step", donate=(0,))
    program = compiled.compile(state, {}, batch).as_text()
    products = len(re.findall(r" = f32\[\d+,\d+\]\S* dot\(", program))
    due = 3 * (7 * args.layers + 1)  # each weight and the head: its own product and both of its derivative
    if products < due:
        raise AssertionError(f"the compiler has left out some of the products with weights: {products} of {due}")
    return lambda state: compiled(state, {}, batch)[0], state


def main() -> int:
    """Prints both times and their ratio."""
    args = parse()
    startup.start()  # as a run begins
    steps, states = {}, {}
    steps["whole"], states["whole"] = make_step(args)
    with left_out():
        steps["bare"], states["bare"] = make_step(args)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.rounds + 1):
        for name in list(steps) if turn % 2 else reversed(list(steps)):
            start = time.perf_counter()
            states[name] = jax.block_until_ready(steps[name](states[name]))
            if turn or args.smoke:  # the first is to get warm
                seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["whole"], seconds["bare"], strict=True)]
    whole, bare = (statistics.median(seconds[name]) for name in ("whole", "bare"))
    print(
        f"hidden {args.hidden}, {args.layers} layers, {args.rows} x {args.length} tokens: "
        f"{1000 * whole:.0f} ms a step, {1000 * bare:.0f} without attention, norms, rotations and activations: "
        f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

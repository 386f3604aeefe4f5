"""The SFT step of each family against Llama's at as many FLOPs of products, in turns in one process.

    python tests/benchmarks/families.py                        hidden 512, 4 layers, 4 rows of 256; about ten minutes
    python tests/benchmarks/families.py --families gemma3_text,gpt2 --rounds 15
    python tests/benchmarks/families.py --smoke                toy size, one round

All have the same hidden size, heads, layers and vocabulary; where an mlp has no gate it is half as wide again, so that
its two matrices have as many numbers as three.  No window is shorter than the rows.  Families whose program is Llama's
own, operation by operation, are named and not timed.  Times are of the clock, and of the cores (CPU), which others'
work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from gpu_parts.batches import texts
from harness.in_turns import against, in_turns, median

from jaxalign.config import defaults
from jaxalign.models import families
from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from jaxalign.parallel import startup
from jaxalign.steps.sft import sft_objective
from jaxalign.steps.step import make_train_step
from jaxalign.train.compiled import Compiled
from jaxalign.train.flops import flops_per_token
from jaxalign.train.optimizer import make_optimizer
from jaxalign.types import TrainState

# What a family's published files say beside the sizes, as far as it is another program.
OWN = {
    "ministral3": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0,
                                       "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16384}},
    "gemma2": {"query_pre_attn_scalar": 64},
    "gemma3_text": {"query_pre_attn_scalar": 64, "sliding_window_pattern": 4},  # a global layer among four
    "granite": {"embedding_multiplier": 12.0, "attention_multiplier": 0.015, "residual_multiplier": 0.22,
                "logits_scaling": 8.0},
    "gpt_neox": {"hidden_act": "gelu"},
    "gpt2": {"activation_function": "gelu_new"},
}  # fmt: skip
_UNLIKE = ("head_dim", "num_key_value_heads", "rms_norm_eps")  # what `layered` families have no field for
_GPT2 = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
_GPT2 |= {"intermediate_size": "n_inner"}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, value in {"hidden": 512, "layers": 4, "heads": 8, "ffn": 1376, "vocab": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--families", help="by model_type; default: all")
    parser.add_argument("--operations", action="store_true", help="how many of each operation, beside Llama's")
    parser.add_argument("--smoke", action="store_true", help="toy size, one round")
    args = parser.parse_args()
    if args.smoke:
        args.hidden, args.layers, args.heads, args.ffn, args.vocab = 32, 2, 2, 64, 128
        args.rows, args.length, args.rounds = 2, 32, 1
    return args


def described(model_type: str, args: argparse.Namespace) -> dict:
    """A family's `config.json` at these sizes."""
    fields = {
        "model_type": model_type,
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "head_dim": args.hidden // args.heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    }
    if model_type in ("gpt_neox", "gpt2"):
        fields = {name: value for name, value in fields.items() if name not in _UNLIKE}
        fields["intermediate_size"] = args.ffn * 3 // 2
    if model_type == "gpt2":
        fields = {_GPT2.get(name, name): value for name, value in fields.items()}
    return fields | OWN.get(model_type, {})


class Step:
    """A family's step, compiled."""

    def __init__(self, model_type: str, args: argparse.Namespace):
        config = from_hf(described(model_type, args), dtype="float32", param_dtype="float32", remat="none")
        self.flops = args.rows * args.length * flops_per_token(config, args.length)
        model = Model(config)
        tx = make_optimizer(defaults("sft").optimizer, 1e-4, 1000)
        step = make_train_step(sft_objective(model.apply, model.head), {"policy": tx})
        params = jax.eval_shape(model.init, jax.random.key(0))
        self.batch = jax.tree.map(jnp.asarray, texts(args.vocab, rows=args.rows, length=args.length))
        self._model, self._tx = model, tx

        def state(params) -> TrainState:
            return TrainState(jnp.int32(0), {"policy": params}, {"policy": tx.init(params)}, {}, jnp.int32(0))

        self._state, self._step = state, step
        self.lowered = jax.jit(step).lower(jax.eval_shape(state, params), {}, self.batch).as_text()

    def compile(self) -> None:
        self._compiled = Compiled(self._step, "step", donate=(0,))
        self.state = jax.jit(self._state)(jax.jit(self._model.init)(jax.random.key(0)))
        self.program = self._compiled.compile(self.state, {}, self.batch).as_text()

    def __call__(self) -> None:
        self.state = jax.block_until_ready(self._compiled(self.state, {}, self.batch)[0])

    def operations(self) -> Counter:
        """Of the model before it is compiled."""
        return Counter(re.findall(r"= (?:stablehlo|chlo)\.(\w+)", self.lowered))


def main() -> int:
    """Prints a line for each family."""
    args = parse()
    startup.start()  # as a run begins
    kinds = [family.model_types[0] for family in families.FAMILIES]
    if args.families:
        kinds = ["llama", *(kind for kind in args.families.split(",") if kind != "llama")]
    steps = {kind: Step(kind, args) for kind in kinds}
    llama = steps["llama"]
    same = [kind for kind in kinds if kind != "llama" and steps[kind].lowered == llama.lowered]
    timed = {kind: step for kind, step in steps.items() if kind not in same}
    if args.smoke:
        timed = {kind: timed[kind] for kind in ("llama", "gemma3_text")}  # compiling takes longest
    for kind, step in timed.items():
        assert abs(step.flops / llama.flops - 1) < 0.001, f"{kind} has {step.flops / llama.flops} of Llama's FLOPs"
        step.compile()
    taken = in_turns(timed, args.rounds, warm=0 if args.smoke else 2)
    shape = f"hidden {args.hidden}, {args.layers} layers, {args.rows} x {args.length} tokens"
    print(f"{shape}, {llama.flops:.3g} FLOPs a step")
    for kind, step in timed.items():
        wall, cpu = median(taken[kind])
        speed = args.rows * args.length / wall
        line = f"{kind:12} {speed:7,.0f} tokens/s, {1000 * wall:5.0f} ms, CPU {1000 * cpu:5.0f}"
        print(f"{line}; Llama's time {against(taken[kind], taken['llama'])}", flush=True)
        if args.operations:
            more = step.operations() - llama.operations()
            print("             more: " + ", ".join(f"{count} {name}" for name, count in more.most_common()))
    print(f"Llama's own program: {', '.join(same) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

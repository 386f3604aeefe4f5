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

from harness.in_turns import against, in_turns, median
from harness.sft_step import SftStep, add_sizes, described, sized

from jaxalign.models import families
from jaxalign.parallel import startup
from jaxalign.train.flops import flops_per_token

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
    add_sizes(parser, layers=4, rows=4, rounds=9)
    parser.add_argument("--families", help="by model_type; default: all")
    parser.add_argument("--operations", action="store_true", help="how many of each operation, beside Llama's")
    return sized(parser.parse_args(), 32)


def of_family(model_type: str, args: argparse.Namespace) -> dict:
    """A family's `config.json` at these sizes."""
    fields = described(model_type, args)
    if model_type in ("gpt_neox", "gpt2"):
        fields = {name: value for name, value in fields.items() if name not in _UNLIKE}
        fields["intermediate_size"] = args.ffn * 3 // 2
    if model_type == "gpt2":
        fields = {_GPT2.get(name, name): value for name, value in fields.items()}
    return fields | OWN.get(model_type, {})


def operations(lowered: str) -> Counter:
    """How many of each a step has before it is compiled."""
    return Counter(re.findall(r"= (?:stablehlo|chlo)\.(\w+)", lowered))


def main() -> int:
    """Prints a line for each family."""
    args = parse()
    startup.start()  # as a run begins
    kinds = [family.model_types[0] for family in families.FAMILIES]
    if args.families:
        kinds = ["llama", *(kind for kind in args.families.split(",") if kind != "llama")]
    steps = {kind: SftStep(of_family(kind, args), args.rows, args.length) for kind in kinds}
    lowered = {kind: step.lowered() for kind, step in steps.items()}
    flops = {kind: args.rows * args.length * flops_per_token(step.config, args.length) for kind, step in steps.items()}
    same = [kind for kind in kinds if kind != "llama" and lowered[kind] == lowered["llama"]]
    timed = {kind: step for kind, step in steps.items() if kind not in same}
    if args.smoke:
        timed = {kind: timed[kind] for kind in ("llama", "gemma3_text")}  # compiling takes longest
    for kind, step in timed.items():
        share = flops[kind] / flops["llama"]
        assert abs(share - 1) < 0.001, f"{kind} has {share} of Llama's FLOPs"
        step.compile()
    taken = in_turns(timed, args.rounds, warm=0 if args.smoke else 2)
    shape = f"hidden {args.hidden}, {args.layers} layers, {args.rows} x {args.length} tokens"
    print(f"{shape}, {flops['llama']:.3g} FLOPs a step")
    for kind in timed:
        wall, cpu = median(taken[kind])
        speed = args.rows * args.length / wall
        line = f"{kind:12} {speed:7,.0f} tokens/s, {1000 * wall:5.0f} ms, CPU {1000 * cpu:5.0f}"
        print(f"{line}; Llama's time {against(taken[kind], taken['llama'])}", flush=True)
        if args.operations:
            more = operations(lowered[kind]) - operations(lowered["llama"])
            print("             more: " + ", ".join(f"{count} {name}" for name, count in more.most_common()))
    print(f"Llama's own program: {', '.join(same) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

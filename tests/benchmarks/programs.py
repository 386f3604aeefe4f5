"""Llama's training steps of this checkout and of another: the same programs, or how many FLOPs and bytes more.

    python tests/benchmarks/programs.py TREE              each tree in a process of its own; some minutes
    python tests/benchmarks/programs.py --smoke           toy size, this checkout against itself

Programs are compared as text before they are compiled: the same text is the same program, which needs no timing.
Where they differ, both are compiled for a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = {  # task, layers, remat, key heads, tied, dtype, micro-batches
    "SFT": ("sft", 4, "none", 4, False, "float32", 1),
    "SFT, tied, two key heads, bfloat16": ("sft", 4, "dots", 2, True, "bfloat16", 1),
    "SFT, 12 layers in a loop": ("sft", 12, "full", 4, False, "float32", 1),
    "SFT, two micro-batches": ("sft", 4, "full", 4, False, "float32", 2),
    "DPO, live reference": ("dpo", 4, "none", 4, False, "float32", 1),
}


def work(hidden: int) -> None:
    """Answers each line of the input, a step's name and whether it is compiled, with a line of figures."""
    import jax
    import jax.numpy as jnp

    sys.path.insert(0, str(ROOT / "tests/benchmarks/gpu_parts"))
    from batches import pairs, texts

    from jaxalign.config import defaults
    from jaxalign.models import transformer
    from jaxalign.models.config import from_hf
    from jaxalign.steps.preference import preference_objective
    from jaxalign.steps.sft import sft_objective
    from jaxalign.steps.step import make_train_step
    from jaxalign.train.compiled import Compiled
    from jaxalign.train.optimizer import make_optimizer
    from jaxalign.types import TrainState

    for line in sys.stdin:
        name, compiled = json.loads(line)
        task, layers, remat, kv_heads, tied, dtype, micro = STEPS[name]
        sizes = {"vocab_size": 8 * hidden, "hidden_size": hidden, "intermediate_size": 11 * hidden // 4}
        sizes |= {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
        described = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": tied} | sizes
        model = transformer.Model(from_hf(described, dtype=dtype, param_dtype="float32", remat=remat))
        tx = make_optimizer(defaults("sft").optimizer, 1e-4, 1000)
        params = jax.eval_shape(model.init, jax.random.key(0))
        if task == "sft":
            objective, frozen = sft_objective(model.apply, model.head), {}
            batch = texts(8 * hidden, rows=8, length=256, parts=2)
        else:
            options = {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "reference": "live"}
            objective, frozen = preference_objective(model.apply, model.head, **options), {"ref": params}
            batch = pairs(8 * hidden, rows=8, length=256, prompt=128, shared=True)
        step = make_train_step(objective, {"policy": tx}, grad_accum_steps=micro)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        moments = {"policy": jax.eval_shape(tx.init, params)}
        given = TrainState(number, {"policy": params}, moments, {}, number), frozen, jax.tree.map(jnp.asarray, batch)
        text = jax.jit(step, donate_argnums=(0,)).lower(*given).as_text()
        found = {"program": hashlib.sha256(text.encode()).hexdigest(), "lines": text.count("\n")}
        if compiled:
            made = Compiled(step, "step", donate=(0,))
            cost = made.compile(*given).cost_analysis()
            found |= {"flops": cost["flops"], "bytes": made.memory["total"]}
        print(json.dumps(found), flush=True)


def main() -> int:
    """Prints a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tree", nargs="?", default=str(ROOT), help="another checkout; default: this one")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--smoke", action="store_true", help="toy size, one step")
    args = parser.parse_args()
    workers = []
    for tree in (str(ROOT), os.path.abspath(args.tree)):
        command = [sys.executable, os.path.abspath(__file__), "work", str(32 if args.smoke else args.hidden)]
        environment = os.environ | {"PYTHONPATH": tree, "JAX_PLATFORMS": "cpu"}
        workers.append(subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=tree, env=environment))

    def ask(name: str, compiled: bool) -> list[dict]:
        for worker in workers:
            worker.stdin.write(json.dumps([name, compiled]) + "\n")
            worker.stdin.flush()
        return [json.loads(worker.stdout.readline()) for worker in workers]

    for name in list(STEPS)[: 1 if args.smoke else None]:
        here, there = ask(name, False)
        if here == there:
            print(f"{name}: the same program, {here['lines']} lines of {here['program'][:8]}", flush=True)
            continue
        here, there = ask(name, True)
        ratios = [here[what] / there[what] for what in ("flops", "bytes")]
        print(f"{name}: another program, FLOPs {ratios[0]:.4f}x, peak bytes {ratios[1]:.4f}x", flush=True)
    for worker in workers:
        worker.communicate()
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(int(sys.argv[2]))
    else:
        sys.exit(main())

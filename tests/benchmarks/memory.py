"""What SFT, reward, DPO and PPO of one model hold in memory, by role, and what each option saves.

    python tests/benchmarks/memory.py                      a Llama of 56 million parameters; a few minutes
    python tests/benchmarks/memory.py --markdown           tables for the README
    python tests/benchmarks/memory.py --topology gpu:h200:1x1x1 --dtype bfloat16     for a machine that is not there
    python tests/benchmarks/memory.py --smoke              toy size

Every figure is of a real `trainer.Stage`: bytes of weights, frozen models and optimizer are those of its arrays, those
of temporary memory the compiler's account of its train step (`Compiled.memory`), those of sampling its account of the
decode loop. Nothing is trained, so that models that would not fit can be asked about too.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from harness import data
from harness.cases import Case, Shape

from jaxalign import config as configuration
from jaxalign.config import defaults
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.train.checkpoints import abstract
from jaxalign.train.compiled import memory_of
from jaxalign.train.dryrun import abstract_batch
from jaxalign.train.models import num_bytes
from jaxalign.train.rundir import RunDir
from jaxalign.train.trainer import Stage

# (name, algorithm, fields): what is asked about, everything kept and in the full dtype.
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("SFT", "sft", {}),
    ("reward model", "reward", {}),
    ("DPO", "dpo", {}),
    ("DPO, cached reference", "dpo", {"algorithm.reference": "cached"}),
    ("PPO", "ppo", {}),
)
# (name, fields); an option is asked about where the algorithm has its fields and it changes something.
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("remat dots", {"model.remat": "dots"}),
    ("remat full", {"model.remat": "full"}),
    ("grad_accum_steps 4", {"grad_accum_steps": 4}),
    ("frozen_dtype bfloat16", {"model.frozen_dtype": "bfloat16"}),
    ("state_dtype bfloat16", {"optimizer.state_dtype": "bfloat16"}),
    ("adafactor", {"optimizer.name": "adafactor"}),
)
ALL = "all but adafactor"
STATE = ("weights", "frozen", "optimizer", "gradients")
ROLES = (*STATE, "state", "activations", "total", "sampling cache", "sampling")


@dataclasses.dataclass(frozen=True)
class Size:
    """The model and the batch that all cases share."""

    shape: Shape
    rows: int  # records, pairs or prompts of a batch
    length: int  # tokens of a sequence, half of them the prompt's


DEFAULT = Size(Shape(hidden=512, layers=8, heads=8, kv_heads=4, ffn=1376, vocab=32_000), 8, 512)
TOY = Size(Shape(hidden=64, layers=2, heads=2, kv_heads=2, ffn=128, vocab=128), 4, 32)


def write_world(size: Size, directory: Path) -> None:
    """A model's config and tokenizer, the same as a reward model, and a file of records for each algorithm."""
    data.write(Case("", "dpo", (), shape=size.shape, batch=1, batches=1, length=16, prompt=8), directory)
    config = json.loads((directory / "model" / "config.json").read_text())
    (directory / "reward").mkdir()
    for file in (directory / "model").iterdir():
        (directory / "reward" / file.name).write_bytes(file.read_bytes())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
    (directory / "reward" / "config.json").write_text(json.dumps(config))
    rng, half = np.random.default_rng(0), size.length // 2
    words = lambda n: " ".join(f"w{i}" for i in rng.integers(data.FIRST_WORD, size.shape.vocab, n))  # noqa: E731
    for name in ("sft", "dpo", "reward", "ppo"):
        with open(directory / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(2 * size.rows):
                record = {
                    "sft": lambda: {"prompt": words(half) + " ", "completion": words(half - 1)},
                    "ppo": lambda: {"prompt": words(half)},
                }.get(
                    name, lambda: {"prompt": words(half) + " ", "chosen": words(half - 1), "rejected": words(half - 1)}
                )
                print(json.dumps(record()), file=file)


def make_config(size: Size, world: Path, algorithm: str, dtype: str, fields: dict[str, Any]) -> Any:
    """One stage: everything kept for the backward pass, float32 weights, AdamW, unless `fields` say otherwise."""
    c = defaults(algorithm)
    c.workdir = str(world / "run")
    c.model.path, c.model.from_scratch = str(world / "model"), True
    c.model.dtype, c.model.remat = dtype, "none"
    c.data.sources, c.data.cache_dir = (str(world / f"{algorithm}.jsonl"),), str(world / "cache")
    c.data.max_length, c.batch_size, c.num_train_steps = size.length, size.rows, 1
    c.optimizer.schedule = "constant"
    if algorithm == "sft":
        c.data.packing, c.data.row_length = False, size.length
    if algorithm in ("dpo", "ppo"):
        c.logging.samples_every = 0
    if algorithm == "ppo":
        c.rewards.model = str(world / "reward")
        c.rollout.max_new_tokens = size.length // 2
    c.update_from_flattened_dict(fields)
    configuration.validate(c)
    return c


def measure(config: Any, devices: Any) -> dict[str, Any]:
    """Bytes on each device by role, of one stage."""
    mesh = make_mesh(config.mesh, devices)
    with tempfile.TemporaryDirectory() as scratch:
        stage = Stage(config, mesh, RunDir(scratch))
        models = {name: role.model.abstract() for name, role in stage.program.frozen.items()}
        frozen = abstract(models, param_shardings(mesh, models))
        batch, start = abstract_batch(stage), time.monotonic()
        with jax.set_mesh(mesh):
            stage.step.compile(stage.like, frozen, batch)
            found = _parts(stage, frozen, batch)
            if config.algorithm.name == "ppo":
                found |= _sampling(stage, found)
    # What the step does not read (PPO's frozen models) is no argument of its program, and in memory all the same.
    return found | {"compile_seconds": time.monotonic() - start, "rows": list(batch_shape(batch))}


def batch_shape(batch: Any) -> tuple[int, int]:
    """Rows and their length."""
    return (batch.rows if hasattr(batch, "rows") else batch.batch.rows).tokens.shape


def _parts(stage: Any, frozen: Any, batch: Any) -> dict[str, int]:
    account = stage.step.memory
    if not account:
        raise SystemExit("found:    a compiler without a memory account\nexpected: one\nfix:      JAX_PLATFORMS=cpu")
    one = _on_one_device
    gradients = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32), sharding=x.sharding),
        stage.like.params,
    )
    temporary = account["temporary"] + account["results"]
    parts = {
        "weights": one(stage.like.params),
        "frozen": one(frozen),
        "optimizer": one(stage.like.opt),
        "gradients": one(gradients),
        "activations": temporary - one(gradients),
        "batch": one(batch),
    }
    return parts | {
        "state": sum(parts[role] for role in STATE),
        "total": sum(parts.values()),
        "temporary": temporary,
        "models": len(stage.like.params) + len(stage.program.frozen),
    }


def _on_one_device(tree: Any) -> int:
    return num_bytes(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), tree))


def _sampling(stage: Any, parts: dict[str, int]) -> dict[str, int]:
    """The cache, and the memory while it is at its widest: weights and optimizer stay where they are."""
    from jaxalign.rollout.generate import cache_width
    from jaxalign.rollout.slots import advance, empty_rollout, lay_out, prefill, seat

    c, policy = stage.config, stage.program.trained["policy"].model
    prompts, new = stage.dataset.batch(0), c.rollout.max_new_tokens
    widest = (c.batch_size, stage.dataset.shape.length)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(widest, x.dtype), prompts.rows)
    ids = jax.ShapeDtypeStruct((c.batch_size * c.rollout.num_samples,), np.int32)
    params, width = stage.like.params["policy"], cache_width(rows.tokens.shape[1] + new)
    laid = jax.eval_shape(lambda p: lay_out(policy, p), params)
    prefilled = jax.eval_shape(lambda p, r: prefill(policy, p, r), params, rows)
    slots = jax.eval_shape(lambda p, i: seat(p, i, width=width), prefilled, ids)
    rollout = jax.eval_shape(lambda: empty_rollout(batch=ids.shape[0], length=new, dtype=jnp.float32))
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "stop_ids": stage.stop_ids or (0,)}
    numbers = (jax.eval_shape(lambda: jax.random.key(0)), *(np.int32(0) for _ in range(3)))
    loop = advance.lower(policy, laid, slots, rollout, *numbers, max_new_tokens=new, **options).compile()
    there = parts["weights"] + parts["frozen"] + parts["optimizer"]
    read = memory_of(prefill.lower(policy, params, rows).compile())["total"] - _on_one_device(params)
    return {
        "sampling cache": num_bytes((slots.cache.keys, slots.cache.values)),
        "laid out": num_bytes(laid),
        "sampling": there + max(read, memory_of(loop)["total"]),
    }


def run(size: Size, dtype: str, devices: Any, options: tuple) -> list[dict[str, Any]]:
    """All cases, each alone and with each option."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch)
        write_world(size, world)
        for name, algorithm, fields in CASES:
            everything = {
                k: v for option, fs in OPTIONS if option not in ("adafactor", "remat dots") for k, v in fs.items()
            }
            for option, more in (("", {}), *options, (ALL, everything)):
                has_frozen = algorithm == "ppo" or (algorithm == "dpo" and "algorithm.reference" not in fields)
                if option.startswith("frozen") and not has_frozen:
                    continue
                config = make_config(size, world, algorithm, dtype, fields | more)
                found = measure(config, devices)
                results.append({"case": name, "option": option} | found)
                print(f"  {name}{', ' + option if option else ''}: {_gib(found['total'])}", file=sys.stderr, flush=True)
                gc.collect()
    return results


def problems(results: list[dict[str, Any]]) -> list[str]:
    """What cannot be: sums and savings that are known beforehand."""
    found = {(r["case"], r["option"]): r for r in results}
    wrong = []

    def due(what: str, there: float, wanted: float, tolerance: float = 0.001) -> None:
        if abs(there - wanted) > tolerance * max(abs(wanted), 1):
            wrong.append(f"{what}: {there:,.0f} bytes, {wanted:,.0f} due")

    live, cached, ppo = (found[n, ""] for n in ("DPO", "DPO, cached reference", "PPO"))
    due("a live reference", live["frozen"], live["weights"])
    due("a cached reference", cached["frozen"], 0)
    due("Adam's moments", live["optimizer"], 2 * live["weights"])
    due("frozen models of PPO beside trained ones", ppo["frozen"], ppo["weights"], 0.01)
    for (case, option), r in found.items():
        if option in ("state_dtype bfloat16", ALL):
            due(f"{case} with moments in bfloat16", r["optimizer"], found[case, ""]["optimizer"] / 2)
        if option in ("frozen_dtype bfloat16", ALL):
            due(f"{case} with frozen models in bfloat16", r["frozen"], found[case, ""]["frozen"] / 2)
        if r["activations"] < 0:
            wrong.append(f"{case} {option}: the compiler's temporary memory does not hold the gradients")
        if option == ALL and r["total"] >= found[case, ""]["total"]:
            wrong.append(f"{case}: all options together save nothing")
    return wrong


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def tables(result: dict[str, Any]) -> list[list[list[str]]]:
    """By role, and what each option saves; the first line of each is its head."""
    plain = {r["case"]: r for r in result["results"] if not r["option"]}
    names = {
        "state": "these four",
        "activations": "activations and rest",
        "total": "train step",
        "sampling": "while sampling",
    }
    roles = [["case", "models", *(names.get(r, r) for r in ROLES)]]
    for case, r in plain.items():
        cells = {role: _gib(r[role]) if r.get(role) else "" for role in ROLES}
        for role in ("state", "total"):
            cells[role] += f" ({r[role] / plain['SFT'][role]:.2f}x)"
        roles.append([case, str(r["models"]), *cells.values()])
    options = [["train step with", *plain]]
    asked = {r["option"] for r in result["results"]}
    for option in (name for name in (*(o[0] for o in OPTIONS), ALL) if name in asked):
        line = [option]
        for case, base in plain.items():
            r = next((r for r in result["results"] if (r["case"], r["option"]) == (case, option)), None)
            line.append("" if r is None else f"{_gib(r['total'])} ({100 * (r['total'] / base['total'] - 1):+.0f} %)")
        options.append(line)
    return [roles, options]


def notes(result: dict[str, Any]) -> str:
    """What was measured, and how."""
    s, shape = result["size"], result["size"]["shape"]
    rows = {r["case"]: r["rows"] for r in result["results"] if not r["option"]}
    return (
        f"{result['date']}, {result['device']}, jax {result['jax']}: a Llama of "
        f"{result['parameters'] / 1e6:.0f} M parameters (hidden {shape['hidden']}, {shape['layers']} layers, "
        f"vocabulary {shape['vocab']:,}), computing in {result['dtype']}; {s['rows']} records of {s['length']} tokens, "
        "half of them the prompt's: "
        + ", ".join(f"{case} {b} x {t}" for case, (b, t) in rows.items())
        + ".\nWeights, frozen models and optimizer by their arrays; gradients in float32; activations and the rest are "
        "what the compiler's temporary memory holds beside gradients at its fullest. While sampling: weights, frozen "
        "models and optimizer, the policy laid out for decoding, the cache, and what the loop needs. In brackets: "
        "times SFT; in the second table against the same case without the option. Weights stay in float32."
    )


def rendered(lines: list[list[str]], markdown: bool) -> str:
    """A table for the terminal, or in Markdown."""
    if markdown:
        cells = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([cells[0], "|" + "---|" * len(lines[0]), *cells[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def main() -> int:
    """Asks, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="see the head of this file")
    parser.add_argument("--smoke", action="store_true", help="toy size, all options together")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--rows", type=int, help="records of a batch")
    parser.add_argument("--length", type=int, help="tokens of a sequence, half of them the prompt's")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument(
        "--topology", help="a machine that is not there, as jaxalign.plan names it; needs the extra plan"
    )
    args = parser.parse_args()
    size = TOY if args.smoke else DEFAULT
    size = dataclasses.replace(size, rows=args.rows or size.rows, length=args.length or size.length)
    if args.topology:
        from jaxalign.plan import absent_devices

        devices = absent_devices(args.topology)
    else:
        devices = jax.devices()[:1]
    options = () if args.smoke else OPTIONS
    results = run(size, args.dtype, devices, options)
    sft = next(r for r in results if r["case"] == "SFT")
    result = {
        "format": 1,
        "date": datetime.date.today().isoformat(),
        "device": f"{len(devices)} x {devices[0].device_kind}" + (" (absent)" if args.topology else ""),
        "jax": jax.__version__,
        "smoke": args.smoke,
        "dtype": args.dtype,
        "size": dataclasses.asdict(size),
        "parameters": sft["weights"] // 4 * len(devices),
        "results": results,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n\n".join(rendered(t, args.markdown) for t in tables(result)) + "\n\n" + notes(result))
    wrong = problems(results)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

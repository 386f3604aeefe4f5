"""What SFT, reward, DPO and PPO of one model hold in memory, by role, and what each option saves.

    python tests/benchmarks/memory.py                      a Llama of 56 million parameters; a few minutes
    python tests/benchmarks/memory.py --markdown           tables for docs/memory.md
    python tests/benchmarks/memory.py --cases sft,ppo      some of them
    python tests/benchmarks/memory.py --topology gpu:h200:1x1x1 --dtype bfloat16     AOT for a target topology
    python tests/benchmarks/memory.py --smoke              toy size

Every figure is of a real `Stage`: bytes of weights, frozen models and optimizer are those of its arrays, those
of temporary memory the compiler's account of its train step (`Compiled.memory`), those of PPO's other phases its
account of the decode loop and of the forward passes. Nothing is trained, so that models that would not fit can be asked
about too. A CPU's only memory is the host's: what `model.remat=offload` keeps there shows with --topology alone, and
what `algorithm.offload` keeps there is left out by its arrays, on any platform.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from harness import data
from harness.account import STATE, measure
from harness.cases import Case, Shape

from jaxalign import config as configuration
from jaxalign.config import defaults

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
    ("model.remat=dots", {"model.remat": "dots"}),
    ("model.remat=offload", {"model.remat": "offload"}),
    ("model.remat=full", {"model.remat": "full"}),
    ("grad_accum_steps=4", {"grad_accum_steps": 4}),
    ("model.frozen_dtype=bfloat16", {"model.frozen_dtype": "bfloat16"}),
    ("algorithm.offload", {"algorithm.offload": True}),
    ("optimizer.state_dtype=bfloat16", {"optimizer.state_dtype": "bfloat16"}),
    ("optimizer.state_dtype=int8", {"optimizer.state_dtype": "int8"}),
    ("optimizer.name=adafactor", {"optimizer.name": "adafactor"}),
)
# All together: what saves most of each kind, and AdamW.
ALL = "every option"
TOGETHER = (
    "model.remat=full",
    "grad_accum_steps=4",
    "model.frozen_dtype=bfloat16",
    "algorithm.offload",
    "optimizer.state_dtype=int8",
)
ROLES = (*STATE, "activations", "cache")
PHASES = {"total": "update", "sampling": "sampling", "scoring": "scoring", "peak": "most", "host": "on the host"}


@dataclasses.dataclass(frozen=True)
class Size:
    """The model and the batch that all cases share."""

    shape: Shape
    rows: int  # records, pairs or prompts of a batch
    length: int  # tokens of a sequence, half of them the prompt's


DEFAULT = Size(Shape(hidden=512, layers=8, heads=8, kv_heads=4, ffn=1376, vocab=32_000), 8, 512)
TOY = Size(Shape(hidden=64, layers=2, heads=2, kv_heads=2, ffn=128, vocab=128), 4, 32)


def parameters(s: Shape) -> int:
    """Of the language model."""
    layer = 2 * s.hidden * s.hidden * (s.heads + s.kv_heads) // s.heads + 3 * s.hidden * s.ffn + 2 * s.hidden
    return 2 * s.vocab * s.hidden + s.layers * layer + s.hidden


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


def applies(option: str, algorithm: str, fields: dict[str, Any], topology: bool) -> bool:
    """Whether an option changes anything in a case."""
    if option == "model.remat=offload":
        return topology or jax.default_backend() != "cpu"
    if option == "algorithm.offload":
        return algorithm == "ppo"
    has_frozen = algorithm == "ppo" or (algorithm == "dpo" and "algorithm.reference" not in fields)
    return has_frozen or not option.startswith("model.frozen")


def run(size: Size, dtype: str, devices: Any, cases: tuple, options: tuple, topology: bool) -> list[dict[str, Any]]:
    """The cases, each alone, with each option, and with those of `TOGETHER`."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch)
        write_world(size, world)
        for name, algorithm, fields in cases:
            possible = [(o, more) for o, more in OPTIONS if applies(o, algorithm, fields, topology)]
            everything = {k: v for option, more in possible if option in TOGETHER for k, v in more.items()}
            for option, more in (("", {}), *(x for x in possible if x in options), (ALL, everything)):
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

    for (case, option), r in found.items():
        plain = found[case, ""]
        if not option:
            due(f"Adam's moments of {case}", r["optimizer"], 2 * r["weights"])
            due(f"frozen models of {case}", r["frozen"], 0 if r["models"] == 1 else r["weights"], 0.01)
        if option == "optimizer.state_dtype=bfloat16":
            due(f"{case} with moments in bfloat16", r["optimizer"], plain["optimizer"] / 2)
        if option in ("optimizer.state_dtype=int8", ALL):
            due(f"{case} with moments in 8.5 bits", r["optimizer"], plain["optimizer"] * 17 / 64, 0.02)
        if option in ("model.frozen_dtype=bfloat16", ALL):
            due(f"{case} with frozen models in bfloat16", r["frozen"], plain["frozen"] / 2)
        if option == "algorithm.offload":
            due("an update with frozen models on the host", r["total"], plain["total"] - plain["frozen"])
            due(
                "sampling with frozen models and moments there",
                r["sampling"],
                plain["sampling"] - plain["frozen"] - plain["optimizer"],
            )
            due("scoring with moments there", r["scoring"], plain["scoring"] - plain["optimizer"])
        if r["activations"] < 0:
            wrong.append(f"{case} {option}: the compiler's temporary memory does not hold the gradients")
        if option == ALL and r["total"] >= plain["total"]:
            wrong.append(f"{case}: options together save nothing")
    return wrong


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def tables(result: dict[str, Any]) -> list[list[list[str]]]:
    """By role, by PPO's phases, and what each option saves; the first line of each is its head."""
    found = {(r["case"], r["option"]): r for r in result["results"]}
    plain = {case: r for (case, option), r in found.items() if not option}
    first = next(iter(plain.values()))["peak"]
    roles = [["", "models", *ROLES, "most at once", f"with {ALL}"]]
    for case, r in plain.items():
        most = (f"{_gib(x['peak'])} ({x['peak'] / first:.2f}x)" for x in (r, found[case, ALL]))
        roles.append([case, str(r["models"]), *(_gib(r[role]) if r.get(role) else "" for role in ROLES), *most])
    asked = [o for o in (*(name for name, _ in OPTIONS), ALL) if any(r["option"] == o for r in result["results"])]
    options = [["an update with", *plain]]
    for option in asked:
        line = [option]
        for case, base in plain.items():
            r = found.get((case, option))
            line.append("" if r is None else f"{_gib(r['total'])} ({100 * (r['total'] / base['total'] - 1):+.0f} %)")
        options.append(line)
    if "PPO" not in plain:
        return [roles, options]
    phases = [["PPO while", *PHASES.values()]]
    for option in ("", *asked):
        if ("PPO", option) in found:
            phases.append([option or "as it is", *(_gib(found["PPO", option][phase]) for phase in PHASES)])
    return [roles, options, phases]


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
        + ".\nBytes on each device. Weights, frozen models and optimizer by their arrays; gradients in float32; "
        "activations and the rest are what the compiler's temporary memory holds beside gradients at its fullest; the "
        "cache is that of sampling. Most at once: of an update, and in PPO of sampling and scoring too; in brackets "
        f"times {next(iter(rows))}, in the second table against the same case without the option. Weights stay in "
        f"float32. {ALL.capitalize()}: {', '.join(TOGETHER)}, where it applies."
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
    parser.add_argument("--cases", default="all", help="names, or their first words, by commas")
    parser.add_argument("--options", default="all", help="parts of their names, by commas; none: those together alone")
    parser.add_argument("--rows", type=int, help="records of a batch")
    parser.add_argument("--length", type=int, help="tokens of a sequence, half of them the prompt's")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument("--topology", help="a target topology, as jaxalign.plan names it; needs the extra plan")
    args = parser.parse_args()
    size = TOY if args.smoke else DEFAULT
    size = dataclasses.replace(size, rows=args.rows or size.rows, length=args.length or size.length)
    if args.topology:
        from jaxalign.plan.machines import absent_devices

        devices = absent_devices(args.topology)
    else:
        devices = jax.devices()[:1]
    wanted = "none" if args.smoke else args.options
    options = tuple(o for o in OPTIONS if wanted == "all" or any(part in o[0] for part in wanted.split(",")))
    asked = args.cases.lower().split(",")
    cases = tuple(c for c in CASES if "all" in asked or any(c[0].lower().startswith(a) for a in asked))
    results = run(size, args.dtype, devices, cases, options, bool(args.topology))
    result = {
        "format": 1,
        "date": datetime.date.today().isoformat(),
        "device": f"{len(devices)} x {devices[0].device_kind}" + (" (absent)" if args.topology else ""),
        "jax": jax.__version__,
        "smoke": args.smoke,
        "dtype": args.dtype,
        "size": dataclasses.asdict(size),
        "parameters": parameters(size.shape),
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

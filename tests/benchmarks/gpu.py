"""Checks and times everything on one GPU, in one call of under nine minutes, and prints one table.

    python tests/benchmarks/gpu.py --json OUT.json         all parts
    python tests/benchmarks/gpu.py --parts ceilings,generation-8B --seconds 120
    python tests/benchmarks/gpu.py --smoke                 toy shapes on the CPU: does every part still run

The machine may be bare: jax, flax and optax do for all but the torch baseline and the tests, and a part says what it
lacks. Every part is a process of its own (`gpu_parts/`) with a share of the time, stopped when that is over; the rows
that it has printed by then count, and time that a part leaves goes to those after it. GPU_NOTES.md has the results.

Beside each measurement stands what `jaxalign plan` predicts for the program that was timed. What it misses most is
printed first, with the `--assume` that would mend it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# (name, script, options, share of the time), in the order that they run: the ceilings first, they are divided by.
PARTS: tuple[tuple[str, str, dict[str, Any], float], ...] = (
    ("ceilings", "ceilings", {}, 20),
    ("parity", "parity", {}, 50),
    ("attention", "attention", {}, 65),
    ("blocks", "blocks", {}, 45),
    ("training-1B", "training", {"model": "1B"}, 110),
    ("training-8B", "training", {"model": "8B"}, 100),
    ("generation-1B", "generation", {"model": "1B"}, 45),
    ("generation-8B", "generation", {"model": "8B"}, 45),
    ("torch", "baseline_torch", {}, 70),
    ("suite", "suite", {}, 25),
)
HEAD = ["part", "case", "result", "", "predicted", "ratio", "TFLOP/s", "share", "GiB", "note"]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="see the head of this file")
    parser.add_argument("--parts", help=f"of {', '.join(p[0] for p in PARTS)}; default: all")
    parser.add_argument("--seconds", type=float, default=520, help="for all parts together (default 520)")
    parser.add_argument("--json", type=Path, help="file for the result; default: $OUT/gpu.json where OUT is set")
    parser.add_argument("--torch_python", help="that has torch and transformers; default: this one, or .venv-oracle's")
    parser.add_argument("--smoke", action="store_true", help="toy shapes on the CPU, with three times the seconds")
    args = parser.parse_args()
    args.seconds *= 3 if args.smoke else 1  # a processor that others use too is no reason to fail
    return args


def run_part(script: str, options: dict[str, Any], python: str, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Runs one part; returns its rows, and why it ended where it did not end well."""
    rows: list[dict[str, Any]] = []
    command = [python, "-u", str(HERE / "gpu_parts" / f"{script}.py"), json.dumps(options | {"seconds": seconds})]
    # A session of its own: what the part has started ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )
    over = threading.Event()

    def stop() -> None:
        over.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds + 10, stop)
    timer.start()
    other: list[str] = []
    try:
        for line in process.stdout:
            if line.startswith("ROW "):
                rows.append(json.loads(line[4:]))
                print(f"  {text_of(rows[-1])}", flush=True)
            elif line.strip():
                other.append(line.rstrip())
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            stop()
    if over.is_set():
        return rows, f"stopped after {seconds + 10:.0f} s"
    if code:
        print("\n".join(f"    {line}" for line in other[-12:]), flush=True)
        return rows, f"ended with code {code}: {other[-1][:140] if other else 'no words'}"
    return rows, ""


def text_of(row: dict[str, Any]) -> str:
    """A row in one line."""
    return "  ".join(cell for cell in cells("", row) if cell)


def cells(part: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    figure = row["figure"]
    shown = "" if figure is None else f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"
    number = lambda key, form: "" if row.get(key) is None else form.format(row[key])  # noqa: E731
    note = ("WRONG. " if row.get("ok") is False else "") + row.get("note", "")
    return [
        *(part, row["case"], shown, row["unit"]),
        *(number("predicted_ms", "{:,.4g} ms"), number("ratio", "{:.2f}x")),
        *(number("tflops", "{:.3g}"), number("share", "{:.0%}"), number("gib", "{:.1f}"), note),
    ]


def table(result: dict[str, Any]) -> str:
    """All parts, with aligned columns."""
    lines = [HEAD]
    for name, part in result["parts"].items():
        lines += [cells(name, row) for row in part["rows"]]
        if part["ended"]:
            lines.append([name, *[""] * (len(HEAD) - 2), part["ended"]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def furthest_off(result: dict[str, Any]) -> str:
    """Each measurement that `jaxalign plan` predicts, the one that it misses most first, and what would mend it."""
    rows = [(name, r) for name, p in result["parts"].items() for r in p["rows"] if r.get("ratio")]
    if not rows:
        return "nothing was predicted: what ran has no prediction, or this device's numbers are not known"
    lines = []
    for name, r in sorted(rows, key=lambda one: -abs(math.log(one[1]["ratio"]))):
        rest = "" if 0.99 < r["unexplained"] < 1.01 else f", which leaves {r['unexplained']:.2f}x"
        lines.append([f"{r['ratio']:.2f}x", f"--assume {r['assume']}", f"for {r['assumed']}{rest}", name, r["case"]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    body = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    title = "seconds measured / predicted by `jaxalign plan`, furthest off first, with the number that would mend it:"
    return "\n".join([title, *body])


def python_with_torch(asked: str | None) -> str:
    """The Python that the torch baseline runs in; the part says so where it has no torch."""
    oracle = ROOT / ".venv-oracle" / "bin" / "python"
    if asked:
        return asked
    return str(oracle) if importlib.util.find_spec("torch") is None and oracle.exists() else sys.executable


def versions() -> dict[str, str]:
    """Of what counts here, as far as it is installed."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "tokamax"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Runs the parts, prints the table, writes the JSON."""
    args = parse()
    names = args.parts.split(",") if args.parts else [p[0] for p in PARTS]
    unknown = sorted(set(names) - {p[0] for p in PARTS})
    if unknown:
        raise SystemExit(
            f"found:    {', '.join(unknown)}\nexpected: {', '.join(p[0] for p in PARTS)}\nfix:      --parts"
        )
    chosen = [p for p in PARTS if p[0] in names]
    target = args.json or (Path(os.environ["OUT"]) / "gpu.json" if os.environ.get("OUT") else None)
    options = {"smoke": args.smoke, "ceilings": {}} | ({"platform": "cpu"} if args.smoke else {})
    result: dict[str, Any] = {
        "format": 1,
        "date": datetime.date.today().isoformat(),
        "smoke": args.smoke,
        "versions": versions(),
        "parts": {},
    }
    end, shares = time.monotonic() + args.seconds, sum(p[3] for p in chosen)
    for name, script, more, weight in chosen:
        seconds = max((end - time.monotonic()) * weight / shares, 5.0)
        shares -= weight
        print(f"{name}: {seconds:.0f} s", flush=True)
        start = time.monotonic()
        python = python_with_torch(args.torch_python) if name == "torch" else sys.executable
        rows, ended = run_part(script, options | more, python, seconds)
        result["parts"][name] = {"seconds": round(time.monotonic() - start, 1), "rows": rows, "ended": ended}
        if name == "ceilings":
            scale = {"flops": 1e12, "bytes": 1e12}
            options["ceilings"] = {r["ceiling"]: r["figure"] * scale[r["ceiling"]] for r in rows if r.get("ceiling")}
            result["ceilings"] = options["ceilings"]
        if target:
            target.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + furthest_off(result))
    print("\n" + table(result))
    print(f"\n{result['date']}, {', '.join(f'{k} {v}' for k, v in result['versions'].items())}")
    wrong = [name for name, p in result["parts"].items() if any(r.get("ok") is False for r in p["rows"])]
    ended = [name for name, p in result["parts"].items() if p["ended"]]
    if wrong or ended:
        print(f"wrong: {', '.join(wrong) or 'none'}; ended early: {', '.join(ended) or 'none'}")
    return bool(wrong or (args.smoke and ended))


if __name__ == "__main__":
    sys.exit(main())

"""The README's "Your own pairs", followed in a fresh clone: seconds from a finished install to the first step.

    python tests/benchmarks/first_pairs.py                  clones this checkout, installs, trains; a few minutes
    python tests/benchmarks/first_pairs.py --venv .venv     takes an environment that is there: without the install
    python tests/benchmarks/first_pairs.py --smoke          the same with a few pairs, and the .venv of this checkout

The files and commands are cut out of README.md: the example line decides the columns of `pairs.jsonl`, the config is
written where its first line says, and each command of that section runs as it stands, in the clone's own directory.
Only what a machine without internet cannot have is exchanged: the hub id becomes a small local model
(`$JAXALIGN_SHARED/models/stories3m-llama`, or one made from a seed), and the pairs are made here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HUB_ID = "meta-llama/Llama-3.2-1B-Instruct"
TARGET = 300  # seconds from a finished install to the first training step


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--venv", type=Path, help="an environment that has jaxalign's dependencies; default: a new one")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs to train on (default 1000)")
    parser.add_argument("--smoke", action="store_true", help="few pairs, this checkout's .venv")
    return parser.parse_args()


def section(readme: str) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """Of "Your own pairs": the files by name, the commands in order, and the example line of the data."""
    text = readme.split("## Your own pairs")[1].split("\n## ")[0]
    files = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", text, re.DOTALL))
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    example = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    return files, [line.split("  #")[0].strip() for line in commands.splitlines() if line.strip()], example


def write_pairs(path: Path, count: int, example: dict[str, str], seed: int) -> None:
    """Pairs in the form of the README's line: polite answers over rude ones."""
    rng, lines = random.Random(seed), [example]
    things = ("salt", "bread", "book", "door", "lamp", "letter", "song", "map", "cup", "coat", "ball", "box", "chair")
    for _ in range(count - 1):
        thing = rng.choice(things)
        lines.append(
            {
                "prompt": f"Ask for the {thing}, number {rng.randrange(10_000)}.",
                "chosen": f"Could you {rng.choice(['pass', 'bring', 'hand'])} me the {thing}, please?",
                "rejected": f"{thing.capitalize()}. {rng.choice(['Now.', 'At once.', 'Hurry.'])}",
            }
        )
    assert all(line.keys() == example.keys() for line in lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def model(clone: Path, python: Path) -> str:
    """A small model: a real one where it is at hand, else one from a seed."""
    shared = Path(os.environ.get("JAXALIGN_SHARED", ROOT.parent / "shared")) / "models/stories3m-llama"
    if shared.is_dir():
        return str(shared)
    make = 'from jaxalign.examples.assets import write_assets; write_assets("world")'
    subprocess.run([python, "-c", make], cwd=clone, check=True)
    return next(str(path.parent) for path in clone.glob("world/**/config.json"))


def first_step(workdir: Path) -> float | None:
    """When the first line of the metrics was written, in seconds since the epoch."""
    file = workdir / "metrics.jsonl"
    if not file.exists() or not (lines := file.read_text().splitlines()):
        return None
    return json.loads(lines[0]).get("time") or file.stat().st_mtime


def run(command: str, clone: Path, environment: dict[str, str], workdir: Path) -> tuple[float, float | None]:
    """Runs a line as a shell does; its seconds, and those until there are metrics."""
    start, seen = time.monotonic(), None
    with (clone / "first_pairs.log").open("a") as log:
        process = subprocess.Popen(["bash", "-c", command], cwd=clone, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            if seen is None and first_step(workdir) is not None:
                seen = time.monotonic() - start
            time.sleep(0.1)
    if process.returncode:
        print((clone / "first_pairs.log").read_text()[-4000:], file=sys.stderr)
        raise SystemExit(f"{command}: exit status {process.returncode}")
    return time.monotonic() - start, seen


def main() -> None:
    """Clones, installs, follows the README, and prints the seconds."""
    args = parse()
    if args.smoke:
        args.pairs, args.venv = 80, args.venv or ROOT / ".venv"
    with tempfile.TemporaryDirectory() as place:
        clone = Path(place) / "jaxalign"
        if (ROOT / ".git").exists():
            subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        else:
            shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".venv*", "runs"))
        start = time.monotonic()
        if args.venv is None:
            subprocess.run(["bash", "launch/setup.sh"], cwd=clone, check=True)
            print(f"install                          {time.monotonic() - start:7.1f} s")
        binaries = (args.venv or clone / ".venv").resolve() / "bin"
        environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(clone)}

        installed = time.monotonic()
        files, commands, example = section((clone / "README.md").read_text())
        local = model(clone, binaries / "python")
        for name, text in files.items():
            (clone / name).parent.mkdir(exist_ok=True)
            (clone / name).write_text(text.replace(HUB_ID, local))
        write_pairs(clone / "pairs.jsonl", args.pairs, example, seed=0)
        write_pairs(clone / "heldout.jsonl", 20, example, seed=1)
        found = None
        for command in commands:
            before = time.monotonic() - installed
            seconds, seen = run(command.replace(HUB_ID, local), clone, environment, clone / "runs/mine")
            print(f"{command[:90]:<90} {seconds:7.1f} s", flush=True)
            if seen is not None and found is None:
                found = before + seen
        if found is None:
            raise SystemExit("no training step was seen")
        print(f"from a finished install to the first training step: {found:.1f} s (aim: {TARGET} s)")
        print(f"to the end of the last command:                     {time.monotonic() - installed:.1f} s")


if __name__ == "__main__":
    main()

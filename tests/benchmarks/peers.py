"""jaxalign, TRL, Tunix and transformers at the same work, in turns, in one run: tokens/s, ratios, share of the ceiling.

    python tests/benchmarks/peers.py                                   all cases, five rounds; about an hour
    python tests/benchmarks/peers.py --cases sft-padded,dpo-live       a name stands for all that begin with it
    python tests/benchmarks/peers.py --smoke                           toy size, one round: does everything still run
    python tests/benchmarks/peers.py --before TREE                     an earlier checkout of jaxalign takes turns too
    python tests/benchmarks/peers.py --markdown RUN.json               the table of an earlier run, for docs/speed.md
    python tests/benchmarks/peers.py --compare OLD.json NEW.json       two runs of the same cases

Run it with the Python that has jaxalign (.venv/bin/python). The peers' environments are made from pins where they are
missing. Every contender is a process that starts once, compiles, warms up, and then works when it is told to; rounds
alternate, so that all see the same machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
import time
from pathlib import Path

from harness import contenders, environments, machine, rounds, table
from harness.cases import CASES, chosen


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="see the head of this file")
    parser.add_argument("--cases", help=f"of {', '.join(c.name for c in CASES)}; default: all")
    parser.add_argument("--contenders", help=f"of {', '.join(contenders.CONTENDERS)}; default: each case's own")
    parser.add_argument("--before", type=Path, metavar="TREE", help="an earlier checkout of jaxalign, as one more")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="cores that are used (default 2)")
    parser.add_argument(
        "--patience", type=float, default=30, help="seconds that a round waits for a quiet machine (default 30)"
    )
    parser.add_argument(
        "--omp_wait",
        choices=("default", "passive"),
        default="default",
        help="torch's idle threads; passive: busy machine",
    )
    parser.add_argument("--json", type=Path, help="file for the result; it is written after each case")
    parser.add_argument("--smoke", action="store_true", help="toy size, one round")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print the table of an earlier run")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="print two runs side by side")
    return parser.parse_args()


def main() -> int:
    """Measures, or prints what was measured."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended
    if args.markdown:
        print(table.markdown(json.loads(args.markdown.read_text())))
        return 0
    if args.compare:
        print(table.compare(*(json.loads(path.read_text()) for path in args.compare)))
        return 0
    wanted = args.contenders.split(",") if args.contenders else list(contenders.CONTENDERS)
    earlier = []
    if args.before:
        contenders.CONTENDERS[contenders.BEFORE] = contenders.Contender(
            "jaxalign_train", ".venv", tree=str(args.before.resolve())
        )
        earlier = [contenders.BEFORE]
    cases = [
        (c, [n for n in c.contenders if n in wanted] + earlier * ("jaxalign" in wanted))
        for c in chosen(args.cases, args.smoke)
    ]
    cases = [(case, names) for case, names in cases if names]
    if not cases:
        raise SystemExit("found:    no case with these contenders\nexpected: one\nfix:      --cases, --contenders")
    for name in {contenders.contender(n, c.task).environment for c, names in cases for n in names}:
        environments.python_of(name)
    cores = machine.use_cores(args.threads)
    if args.smoke:
        args.omp_wait = "passive"  # all start at once
        effort = rounds.Effort(1, cores, 0, args.omp_wait, hurry=True)
    else:
        effort = rounds.Effort(args.rounds, cores, args.patience, args.omp_wait, hurry=False)
    result = {
        "format": 1,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "smoke": args.smoke,
        "omp_wait": args.omp_wait,
        "cases": {},
    }
    failures = []
    for case, names in cases:
        start = time.monotonic()
        print(f"{case.name}: {', '.join(names)}", end=" ", flush=True)
        try:
            result["cases"][case.name] = rounds.run(case, names, effort)
            print(f"{time.monotonic() - start:.0f} s", flush=True)
        except rounds.Failed as error:
            failures.append(case.name)
            print(f"FAILED: {error}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    if result["cases"]:
        print("\n" + table.terminal(result))
    if failures:
        print(f"\nfailed: {', '.join(failures)}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

"""The fuzz campaign: hundreds of bad inputs, each to be refused with words, never with a traceback or in silence.

python -m tests.fuzz                      everything, with a count by group and verdict; status 1 where one failed
python -m tests.fuzz config data/fifo     groups, or cases whose title begins so
python -m tests.fuzz --list               the titles
python -m tests.fuzz --show config/...    what was printed, too
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time

from tests.fuzz.case import OK, VERDICTS, judge
from tests.fuzz.cases import all_cases, sample
from tests.fuzz.pool import run_all


def main() -> int:
    """Runs what was asked for; the status is 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("which", nargs="*", help="groups, or beginnings of titles; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, help="so many cases, evenly over the groups")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="titles and what is expected, nothing run")
    parser.add_argument("--show", action="store_true", help="what each case printed")
    parser.add_argument("--json", help="a file for every outcome")
    args = parser.parse_args()
    cases = all_cases(args.seed)
    if args.which:
        cases = [c for c in cases if any(c.group == w or ("/" in w and c.title.startswith(w)) for w in args.which)]
    if args.sample:
        cases = sample(cases, args.sample, args.seed)
    if args.list:
        print("\n".join(f"{case.expect:8} {case.title}" for case in cases))
        return 0
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    rows = []
    started = time.monotonic()

    def told(case, outcome):
        verdict, why = judge(case, outcome)
        counts[case.group, verdict] += 1
        if sum(counts.values()) % 100 == 0:
            print(f"{sum(counts.values())} of {len(cases)} cases, {time.monotonic() - started:.0f} s", flush=True)
        rows.append({"title": case.title, "verdict": verdict, "why": why, **outcome._asdict()})
        if outcome.seconds > case.limit and verdict == OK:
            print(f"slow: {case.title}: {outcome.seconds:.0f} s", flush=True)
        if verdict != OK:
            print(f"{verdict}: {case.title} (expected: {case.expect}): {why}", flush=True)
        if args.show or outcome.ended:
            print(f"--- {case.title}: status {outcome.status}, {outcome.seconds:.1f} s\n{outcome.text}", flush=True)

    run_all(cases, seed=args.seed, workers=args.workers, told=told)
    groups = list(dict.fromkeys(case.group for case in cases))
    shown = [v for v in VERDICTS if any(counts[g, v] for g in groups)]
    print(f"\n{'group':12}" + "".join(f"{v:>22}" for v in shown))
    for group in (*groups, "all"):
        total = [sum(counts[g, v] for g in groups) if group == "all" else counts[group, v] for v in shown]
        print(f"{group:12}" + "".join(f"{n:22}" for n in total))
    print(f"{len(cases)} cases, seed {args.seed}, {time.monotonic() - started:.0f} s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    return int(any(v != OK and n for (_, v), n in counts.items()))


if __name__ == "__main__":
    sys.exit(main())

"""Results as tables: for the terminal, as Markdown, and two runs side by side."""

from __future__ import annotations

import statistics
from typing import Any

from harness.machine import DISTURBED

Row = list[str]
HEAD = [
    *("case", "contender", "tokens/s", "jaxalign is", "by CPU time", "of ceiling", "peak GiB", "compile s"),
    *("first step s", "cores"),
]


def counted(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The rounds that count: the least disturbed ones, the same of every contender."""
    return [r for r in entry["rounds"] if r["counts"]]


def speeds(entry: dict[str, Any], tokens_per_step: float, clock: str = "seconds") -> list[float]:
    """Tokens a second of each round; or, by `cpu_seconds`, a second of one core."""
    return [r.get("tokens", tokens_per_step * r["steps"]) / r[clock] for r in counted(entry)]


def ratios(found: dict[str, Any], peer: str, clock: str = "seconds") -> list[float]:
    """jaxalign's speed over a peer's, round by round."""
    ours, theirs = (speeds(found["contenders"][n], found["tokens_per_step"], clock) for n in ("jaxalign", peer))
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def ceiling(result: dict[str, Any]) -> float:
    """The most FLOP/s that any product of any round reached."""
    return 1e9 * max(max(turn.values()) for found in result["cases"].values() for turn in found["ceiling"])


def disturbed(entry: dict[str, Any]) -> int:
    """Rounds in which someone else used the cores."""
    return sum((r["others"] or 0) > DISTURBED for r in counted(entry))


def rows(result: dict[str, Any]) -> list[Row]:
    """The table's lines, without its head."""
    top = ceiling(result)
    lines = []
    for name, found in result["cases"].items():
        for who, entry in found["contenders"].items():
            speed = statistics.median(speeds(entry, found["tokens_per_step"]))
            versus = cpu = ""
            if who != "jaxalign" and "jaxalign" in found["contenders"]:
                ratio = ratios(found, who)
                mark = "~" if disturbed(entry) + disturbed(found["contenders"]["jaxalign"]) else ""
                versus = f"{mark}{statistics.median(ratio):.2f}x ({min(ratio):.2f} to {max(ratio):.2f})"
                cpu = f"{statistics.median(ratios(found, who, 'cpu_seconds')):.2f}x"
            used = statistics.median(r["cpu_seconds"] / r["seconds"] for r in counted(entry))
            bad = disturbed(entry)
            compiled = entry["compile_seconds"]
            lines.append(
                [
                    name,
                    who,
                    f"{speed:,.0f}",
                    versus,
                    cpu,
                    f"{100 * speed * entry['flops_per_token'] / top:.0f} %",
                    f"{entry['peak_gib']:.2f}",
                    "" if compiled is None else f"{compiled:.1f}",
                    f"{entry['first_step_seconds']:.1f}",
                    f"{used:.2f}" + (f", {bad} of {len(counted(entry))} disturbed" if bad else ""),
                ]
            )
    return lines


def notes(result: dict[str, Any]) -> str:
    """What the columns mean, and on what machine."""
    m = result["machine"]
    versions: dict[str, str] = {}
    for found in result["cases"].values():
        for entry in found["contenders"].values():
            for name, version in entry["versions"].items():
                versions.setdefault(f"{name} {version}", "")
    return (
        f"{result['date']}, {m['processor']}, {m['cores']} cores used, {m['memory_gib']} GiB, Python {m['python']}; "
        f"float32; ceiling {ceiling(result) / 1e9:,.0f} GFLOP/s, the best of several XLA products between the turns.\n"
        f"{', '.join(versions)}.\n"
        "Medians over the least disturbed rounds, in which contenders take turns; ratios are taken round by round "
        "(least to greatest), and again by the CPU seconds of each, which say what the work costs and not how well it "
        f"is spread over cores. Torch's threads wait by the policy `{result['omp_wait']}`. "
        "Tokens as the peers count them: real ones, a pair's prompt once for each answer, new ones when generating. "
        "Share of the ceiling by 6 N D and attention of what the algorithm needs, padding and recomputation aside. "
        "Peak memory of the process, libraries included. Compile: seconds in XLA's compiler; first step: from the "
        "start of the process. Cores: CPU seconds over seconds; a disturbed round is one in which others had "
        f"more than {DISTURBED:g} cores; ratios with ~ rest on such rounds too, and are no figures to quote."
    )


def terminal(result: dict[str, Any]) -> str:
    """Aligned columns."""
    lines = [HEAD, *rows(result)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([*text, "", notes(result)])


def markdown(result: dict[str, Any]) -> str:
    """As docs/speed.md has it."""
    lines = ["| " + " | ".join(line) + " |" for line in [HEAD, *rows(result)]]
    return "\n".join([lines[0], "|" + "---|" * len(HEAD), *lines[1:], "", notes(result)])


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Two runs: speed, ratio to jaxalign and memory of what both have measured."""
    head = ["case", "contender", "tokens/s", "", "speed", "jaxalign is", "", "peak GiB", ""]
    lines = [head]
    for name, new in after["cases"].items():
        old = before["cases"].get(name)
        if old is None or old["case"] != new["case"]:
            continue
        for who in (w for w in new["contenders"] if w in old["contenders"]):
            pair = [f["contenders"][who] for f in (old, new)]
            speed = [statistics.median(speeds(e, f["tokens_per_step"])) for e, f in zip(pair, (old, new))]
            versus = ["", ""]
            if who != "jaxalign" and all("jaxalign" in f["contenders"] for f in (old, new)):
                versus = [f"{statistics.median(ratios(f, who)):.2f}x" for f in (old, new)]
            peaks = [f"{e['peak_gib']:.2f}" for e in pair]
            lines.append([name, who, *(f"{s:,.0f}" for s in speed), f"{speed[1] / speed[0]:.3f}x", *versus, *peaks])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)

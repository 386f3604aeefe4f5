"""A plan as text."""

from __future__ import annotations

from typing import Any

from jaxalign.plan.predict import Assumptions
from jaxalign.plan.tables import (
    aligned,
    counted,
    duration,
    gib,
    milliseconds,
    seconds_text,
    speed,
    three_digits,
    wrapped,
)
from jaxalign.train.compiled import in_words

_GB = 1e9
_GIB = 2**30

# Bytes by role, as columns: what a role is called, and what it is where its name does not say it.
_ROLES = {
    "prompts read": ("prompts", "prompts: keys, values and logits of the prompts, until decoding has them"),
    "rollout weights": ("rollout", "rollout: the policy's weights as decoding reads them"),
    "from the host": ("fetched", "fetched: frozen weights, on the device while they are used"),
    "padding": ("padding", "padding: of arrays as the compiler lays them out"),
    "results": ("results", "results: what a program gives back beside its donated arguments"),
    "temporary": ("temp", "temp: what the program itself takes, activations and gradients among it"),
}


def as_text(found: dict[str, Any], assumed: Assumptions, *, details: bool = False) -> str:
    """The page that `jaxalign plan` prints: what fits and how fast it is, what does not fit, the largest losses.

    Args:
      found: as `jaxalign.plan.plan.plan` gives it.
      assumed: the numbers of the prediction.
      details: memory, time, traffic and collectives of every program too, and what each assumed number is.
    """
    m, stages = found["machine"], found["stages"]
    pool = m["pool"] / m["memory"]
    lines = wrapped(
        f"{m['name']}: {m['devices']} x {m['kind']} of {m['memory'] / _GIB:.1f} GiB, of which programs may use "
        f"{gib(m['pool'])} (--assume pool={pool:.2g}"
        + (": XLA_PYTHON_CLIENT_MEM_FRACTION)" if m["platform"] == "gpu" else ")")
    )
    lines += ["", *_answer(found, assumed.values["price"])]
    for name, stage in stages.items():
        if stage["programs"]:
            lines += ["", *_stage(name if len(stages) > 1 else "", stage, details)]
        if "search" in stage:
            lines += ["", search_text(name if len(stages) > 1 else "", stage["search"], m["pool"])]
    lines += ["", *_assumed(found, assumed, details)]
    return "\n".join(lines)


def _answer(found: dict[str, Any], price: float) -> list[str]:
    """For each stage whether it fits, how fast it is, how long the whole run takes and what that costs."""
    m, stages, pool = found["machine"], found["stages"], gib(found["machine"]["pool"])
    priced = any(stage["run"]["price"] is not None for stage in stages.values())
    rows = [["", "fits", "GiB a device", "a step", "MFU", "tokens/s", "steps", "the run", "device-hours", "price"]]
    told = []
    for name, stage in stages.items():
        peak = max((p["memory"]["peak"] for p in stage["programs"]), default=0)
        run = stage["run"]
        room = f"{gib(peak)} of {pool}" if peak else f"above {pool}"
        steps = f"{run['steps']:,}" if run["steps"] else "?"
        rows.append([name, "yes" if stage["fits"] else "NO", room, *speed(stage.get("iteration")), steps, *_cost(run)])
        told += [f"{name}: {line}" for line in _run(stage, m["devices"], price)]
    if found.get("together"):
        rows.append(["together", *[""] * 6, *_cost(found["together"])])
    table = aligned([row if priced else row[:-1] for row in rows], indent="  ")
    return [*table, *(line for one in told for line in wrapped(one, "  "))]


def _cost(run: dict[str, Any]) -> list[str]:
    if run["seconds"] is None:
        return ["?", "?", "?"]
    price = "" if run["price"] is None else f"{run['price']:,.2f}"
    return [duration(run["seconds"]["total"]), three_digits(run["device_hours"]), price]


def _timed(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """The programs of a step."""
    return [p for p in stage["programs"] if p["times"]]


def _run(stage: dict[str, Any], devices: int, price: float) -> list[str]:
    """What a run is made of, and what is not known of it."""
    run, told = stage["run"], list(stage["run"]["not_counted"])
    if stage.get("iteration") and run["seconds"] is None:
        seconds = 1000 * stage["iteration"]["seconds"]
        hours = seconds * devices / 3600
        told[0] += f"; 1,000 take {duration(seconds)}, {three_digits(hours)} device-hours"
        told[0] += f", a price of {hours * price:,.2f}" if price else ""
    parts = []
    if run["seconds"] and run["evaluations"] and run["evaluation_batches"]:
        batches = f"{counted(run['evaluations'], 'evaluation')} of {counted(run['evaluation_batches'], 'batch')}"
        parts.append(f"{duration(run['seconds']['evaluations'])} are {batches}")
    if run["seconds"] and run["reference_batches"]:
        batches = f"the reference's pass over {counted(run['reference_batches'], 'batch')}"
        parts.append(f"{duration(run['seconds']['reference pass'])} are {batches}")
    if parts:
        told.insert(0, f"of the run, {', '.join(parts)}")
    if len(timed := _timed(stage)) > 1:
        told.insert(0, f"a step is an iteration: sampling, scoring and {timed[-1]['times']:g} updates")
    return [*told, *(f"warning: {said}" for said in stage.get("warnings", ()))]


def search_text(name: str, found: dict[str, Any], pool: int) -> str:
    """What a search found, as lines of a configuration.

    Args:
      name: of the stage; "" for one alone.
      found: as `jaxalign.plan.search.search` gives it.
      pool: bytes of a device that programs may use.
    """
    lines = wrapped(
        f"{'stage ' + name + ': ' if name else ''}search: {found['estimated']} combinations are estimated to fit, "
        f"{counted(found['compiled'], 'train step')} compiled, {len(found['found'])} fit, the configured one counted; "
        "by predicted tokens/s:"
    )
    told = False
    for one in found["found"]:
        if one.get("changes_optimisation") and not told:
            lines.append(
                "  and of another batch_size, which changes the optimisation (learning rate, number of steps):"
            )
            told = True
        lines.append(
            f"  {one['tokens_per_second']:>10,.0f} tokens/s  MFU {one['mfu']:.1%}  {gib(one['peak'])} of "
            f"{gib(pool)} GiB"
        )
        lines += wrapped(one["lines"], "      ")
    return "\n".join(lines)


def _stage(name: str, stage: dict[str, Any], details: bool) -> list[str]:
    s, programs = stage["settings"], stage["programs"]
    axes = " ".join(f"{axis}={size}" for axis, size in stage["mesh"].items())
    rows = f"rows of {s['row_length']:,} tokens"
    if s.get("max_new_tokens"):
        rows = f"prompts of {s['row_length']:,} tokens, completions of {s['max_new_tokens']:,}"
    lines = wrapped(
        f"{'stage ' + name + ': ' if name else ''}{stage['algorithm']}, mesh {axes}, batch_size {s['batch_size']}, "
        f"grad_accum_steps {s['grad_accum_steps']}, remat {s['remat']}, {rows}"
    )
    lines += [line for told in stage["assumed"] for line in wrapped(told, "  ")]
    if not details:
        too_large = [p for p in programs if not p["fits"]]
        return lines + (_memory(too_large) if too_large else []) + _losses(stage)
    lines += _memory(programs) + _time(programs, s.get("dtype", ""))
    for p in programs:
        if d := p.get("decoding"):
            other = max(d["bytes_per_token"] - d["weights"] - d["cache"], 0)
            lines += wrapped(
                f"{p['name']}: a token of every row moves {d['bytes_per_token'] / _GB:.2f} GB of each device: weights "
                f"{d['weights'] / _GB:.2f}, cache {d['cache'] / _GB:.2f} (all {d['columns']:,} columns, used or not), "
                f"{other / _GB:.2f} that one kernel writes and the next one reads",
                "  ",
            )
    heavy = next((p for p in programs if p["name"] == "train step"), programs[0])
    if heavy["traffic"]:
        lines.append(f"  traffic of the {heavy['name']}, most of it:")
        lines += aligned(
            [
                [f"{k['bytes'] / _GB:.3g} GB", f"{k['count']:,} times", "/".join(k["kernel"].split("/")[-3:])[:80]]
                for k in heavy["traffic"][:3]
            ]
        )
    return lines + _collectives(programs) + _losses(stage)


def _losses(stage: dict[str, Any]) -> list[str]:
    lines = ["  largest losses of a step, against the model's FLOPs at the peak, and what to change:"]
    assumed = [one for one in stage["losses"] if "(assumed)" in one["what"]]
    for loss in [one for one in stage["losses"] if one not in assumed][:3]:
        lines.append(f"    {seconds_text(loss['seconds']):>8}  {loss['program']}: {loss['what']}")
        if loss["change"]:
            changes = "; this changes the optimisation" if loss.get("changes_optimisation") else ""
            lines += wrapped(loss["change"] + changes, " " * 14)
    if assumed:
        seconds = seconds_text(sum(one["seconds"] for one in assumed))
        lines.append(f"    {seconds:>8}  of {assumed[0]['what']}")
    return lines


def _memory(programs: list[dict[str, Any]]) -> list[str]:
    """Bytes by role of each device."""
    every = [name for p in programs for name in p["memory"] if name not in ("peak", "pool")]
    last = [name for name in ("temporary", "padding", "results") if name in every]
    names = [name for name in [*(n for n in dict.fromkeys(every) if n not in last), *last]
             if any(p["memory"].get(name, 0) >= 0.005 * _GIB for p in programs)]  # fmt: skip
    short = {name: _ROLES[name][0] if name in _ROLES else name.split()[0] for name in names}
    columns = list(dict.fromkeys(short.values()))
    table = [["program", *columns, "peak", ""]]
    for p in programs:
        sums = dict.fromkeys(columns, 0)
        for name in names:
            sums[short[name]] += p["memory"].get(name, 0)
        cells = [f"{sums[name] / _GIB:.2f}" if sums[name] else "-" for name in columns]
        peak = f"{p['memory']['peak'] / _GIB:.2f}"
        table.append([p["name"], *cells, peak, "" if p["fits"] else "DOES NOT FIT"])
    words = "; ".join(_ROLES[name][1] for name in names if name in _ROLES)
    pool = in_words(programs[0]["memory"]["pool"])
    lines = [f"  GiB of each device while a program runs, of {pool} that programs may use:", *aligned(table)]
    lines += wrapped(words, "    ")
    worst = max(programs, key=lambda p: p["memory"]["peak"])
    arrays: dict[str, int] = {}
    for a in worst["largest"]:
        told = f"{a['array']} of {in_words(a['bytes'])}"
        arrays[told] = arrays.get(told, 0) + 1
    if arrays:
        told = ", ".join(f"{n} x {array}" if n > 1 else array for array, n in list(arrays.items())[:3])
        lines += wrapped(f"largest arrays of the {worst['name']}: {told}", "    ")
    return lines


def _time(programs: list[dict[str, Any]], dtype: str) -> list[str]:
    """FLOPs and seconds of one run of each program, and MFU."""
    head = ["program", "per step", "per run", "TFLOP", "of model", "GB", "products", "traffic", "exposed", "gaps"]
    table = [[*head, "one run", "MFU"]]
    for p in programs:
        f, t = p["flops"], p["seconds"]
        ratio = f"{f['products'] / f['model']:.2f}x" if f["model"] else "-"
        cells = [milliseconds(t[name]) for name in ("products", "traffic", "collectives", "gaps", "total")]
        runs = "?" if p.get("runs") is None else f"{p['runs']:,.0f}"
        counts = [f"{p['times']:,.0f}" if p["times"] else "-", runs, three_digits(f["products"] / 1e12), ratio]
        table.append(
            [
                p["name"],
                *counts,
                three_digits(p["traffic_bytes"] / _GB),
                *cells,
                f"{p['mfu']:.1%}" if f["model"] else "-",
            ]
        )
    lines = ["  one run of each program on each device, milliseconds:", *aligned(table)]
    lines += wrapped(
        "per step, per run: how often it runs. of model: FLOPs of products against the model's own; more is padding "
        "and what is computed again. GB, traffic: what kernels that are no products move. exposed: collectives that no "
        "work hides",
        "    ",
    )
    other = [(p, p["flops"]["other_dtype"] / p["flops"]["products"]) for p in programs if p["flops"]["products"]]
    for p, share in other:
        if share >= 0.005:
            lines.append(f"    {p['name']}: {share:.1%} of the FLOPs have an input that is not {dtype}")
    return lines


def _collectives(programs: list[dict[str, Any]]) -> list[str]:
    table = [["program", "collective", "dtype", "devices", "count", "GB", "where", "", "alone", "exposed"]]
    for p in programs:
        for c in [c for c in p["collectives"] if c["seconds"] >= 0.002 * p["seconds"]["total"]][:6]:
            way = "async" if c["asynchronous"] else "sync"
            cells = [f"{c['count']:,}", three_digits(c["bytes"] / _GB), _where(c["loop"]), way]
            times = [milliseconds(c["seconds"]), milliseconds(c["exposed"])]
            table.append([p["name"], c["kind"], c["dtype"], str(c["group"]), *cells, *times])
    if len(table) == 1:
        return ["  collectives: none that take time"]
    head = "collectives of one run, milliseconds; GB: the larger of input and output; alone: if nothing hid them:"
    lines = [f"  {head}", *aligned(table)]
    for p in programs:
        if p["resharding_bytes"] > 0.01 * _GB:
            lines.append(
                f"    {p['name']}: {p['resharding_bytes'] / _GB:.2f} GB move that no parameter or sum asks for"
            )
    return lines


def _where(loop: str) -> str:
    """Where a collective is, from the name of its loop.

    >>> _where(""), _where("transpose(jvp())"), _where("jvp()"), _where("jit(prefill)/while")
    ('once', 'backward loop', 'forward loop', 'loop')
    """
    kind = "backward " if "transpose(" in loop else "forward " if "jvp(" in loop else ""
    return f"{kind}loop" if loop else "once"


def _assumed(found: dict[str, Any], assumed: Assumptions, details: bool) -> list[str]:
    """The numbers that this prediction leans on, with details each with what it is; the others by their values."""
    lean = _leant_on(found, assumed)
    words = {line.partition("=")[0]: line for line in assumed.lines()}
    unknown = [name for name in ("steps", "price") if not assumed.values[name]]
    heavy = [line for name, line in words.items() if name in lean]
    if not details:
        most = ", ".join(line.split()[0] for line in heavy)
        return wrapped(
            f"assumed, what weighs most here: {most} (--details: what each is; memory, time, collectives and "
            "traffic of every program)"
        )
    rest = ", ".join(line.split()[0] for name, line in words.items() if name not in lean and name not in unknown)
    return [
        "assumed, what weighs most here (--assume NAME=VALUE changes one; measure these first):",
        *(f"  {line}" for line in heavy),
        *wrapped(f"and, of little weight here: {rest}", "  "),
    ]


def _leant_on(found: dict[str, Any], assumed: Assumptions) -> set[str]:
    """Names of the assumed numbers that a tenth more or less of would be seen in the answer."""
    lean = {"pool", "efficiency", "flops"}
    v, m = assumed.values, found["machine"]
    several = m["devices"] > assumed.machine.domain if m["platform"] == "gpu" else m["name"].count(":") > 2
    for stage in found["stages"].values():
        if any(told.startswith("data:") for told in stage.get("assumed", ())) and v["readouts"] < 1:
            lean.add("readouts")
        for p in _timed(stage):
            t = p["seconds"]
            total = max(t["total"], 1e-12)
            waits = sum(c["count"] for c in p["collectives"]) * v["latency"]
            shares = {
                "bandwidth memory_efficiency": 1.0 if "decoding" in p else t["traffic"] / total,
                "attention_efficiency": 0.5 * p["flops"]["attention"] / max(p["flops"]["products"], 1.0),
                "float32_speed": p["flops"]["other_dtype"] / max(p["flops"]["products"], 1.0),
                "link link_efficiency" + " network" * several: (t["collectives"] + 0.2 * t["hidden"]) / total,
                "launch": t["gaps"] / total,
                "latency": waits * t["collectives"] / max(t["collectives"] + t["hidden"], 1e-12) / total,
            }
            lean |= {name for names, share in shares.items() if share >= 0.02 for name in names.split()}
    return lean | {name for name in ("steps", "price") if v[name]}

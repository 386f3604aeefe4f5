"""A plan as text."""

from __future__ import annotations

from typing import Any

from jaxalign.plan.predict import Assumptions

_GB = 1e9
_GIB = 2**30


def as_text(found: dict[str, Any], assumed: Assumptions) -> str:
    """The page that `jaxalign plan` prints.

    Args:
      found: as `jaxalign.plan.plan.plan` gives it.
      assumed: the numbers of the prediction.
    """
    m = found["machine"]
    pool = m["pool"] / m["memory"]
    lines = [
        f"{m['name']}: {m['devices']} x {m['kind']}, {m['memory'] / _GIB:.1f} GiB each, of which programs may use "
        f"{m['pool'] / _GIB:.1f} GiB (--assume pool={pool:.2f}"
        + (": XLA_PYTHON_CLIENT_MEM_FRACTION)" if m["platform"] == "gpu" else ")"),
    ]
    for name, stage in found["stages"].items():
        lines += ["", *_stage(name, stage)]
        if "search" in stage:
            lines.append(search_text(name, stage["search"], m["pool"]))
    lines += ["", "assumed (--assume NAME=VALUE changes one; measure them first where much hangs on them):"]
    lines += [f"  {line}" for line in assumed.lines()]
    return "\n".join(lines)


def search_text(name: str, found: dict[str, Any], pool: int) -> str:
    """What a search found, as lines of a configuration.

    Args:
      name: of the stage.
      found: as `jaxalign.plan.search.search` gives it.
      pool: bytes of a device that programs may use.
    """
    lines = [
        f"\n{'stage ' + name + ': ' if name else ''}{found['estimated']} combinations are estimated to fit, "
        f"{found['compiled']} were compiled, {len(found['found'])} fit; the fastest train step first:"
    ]
    for one in found["found"]:
        lines.append(
            f"  {one['tokens_per_second']:>12,.0f} tokens/s  MFU {one['mfu']:.1%}  {one['peak'] / _GIB:.1f} of "
            f"{pool / _GIB:.1f} GiB"
        )
        lines.append(f"    {one['lines']}")
    return "\n".join(lines)


def _stage(name: str, stage: dict[str, Any]) -> list[str]:
    s, it = stage["settings"], stage["iteration"]
    axes = " ".join(f"{axis}={size}" for axis, size in stage["mesh"].items())
    lines = [
        f"{'stage ' + name + ': ' if name else ''}{stage['algorithm']}, mesh {axes}, batch_size {s['batch_size']}, "
        f"grad_accum_steps {s['grad_accum_steps']}, remat {s['remat']}, rows of {s['row_length']:,}"
    ]
    lines += [f"  {told}" for told in stage["assumed"]]
    lines += _memory(stage["programs"]) + _time(stage["programs"])
    runs = "an iteration" if len([p for p in stage["programs"] if p["times"]]) > 1 else "a step"
    lines.append(
        f"  {runs}: {_seconds(it['seconds'])}, MFU {it['mfu']:.1%}, {it['tokens_per_second']:,.0f} tokens/s "
        f"({it['tokens_per_second_per_device']:,.0f} a device)"
    )
    heavy = next((p for p in stage["programs"] if p["name"] == "train step"), stage["programs"][0])
    if moved := heavy["traffic"][:3]:
        told = "; ".join(
            f"{k['bytes'] / _GB:.3g} GB {'/'.join(k['kernel'].split('/')[-3:])} ({k['count']:,} times)" for k in moved
        )
        lines.append(f"  traffic of the {heavy['name']}, most of it: {told}")
    lines += _collectives(stage["programs"])
    for p in stage["programs"]:
        if d := p.get("decoding"):
            lines.append(
                f"  decoding: {d['bytes_per_token'] / _GB:.2f} GB for a token of every row, weights and cache are "
                f"{d['weights_and_cache'] / _GB:.2f} GB"
            )
    lines.append("  largest losses against the model's FLOPs at the peak:")
    assumed = [one for one in stage["losses"] if "(assumed)" in one["what"]]
    for loss in [one for one in stage["losses"] if one not in assumed][:3]:
        lines.append(f"    {_seconds(loss['seconds'])}  {loss['program']}: {loss['what']}")
        if loss["change"]:
            lines.append(f"             {loss['change']}")
    if assumed:
        what = assumed[0]["what"]
        lines.append(f"    beside them {_seconds(sum(one['seconds'] for one in assumed))} of {what}")
    return lines


def _memory(programs: list[dict[str, Any]]) -> list[str]:
    """Bytes by role of each device."""
    lines = ["  memory of each device, GiB:"]
    every = dict.fromkeys(name for p in programs for name in p["memory"] if name != "pool")
    names = [name for name in every if any(p["memory"].get(name, 0) >= 0.005 * _GIB for p in programs)] or ["peak"]
    table = [["program", *names, "of", ""]]
    for p in programs:
        cells = [f"{p['memory'].get(name, 0) / _GIB:.2f}" for name in names]
        table.append([p["name"], *cells, f"{p['memory']['pool'] / _GIB:.2f}", "fits" if p["fits"] else "DOES NOT FIT"])
    lines += _table(table)
    worst = max(programs, key=lambda p: p["memory"]["peak"])
    if worst["largest"]:
        arrays = ", ".join(f"{a['array']} {a['bytes'] / _GIB:.2f} GiB" for a in worst["largest"][:3])
        lines.append(f"    largest temporaries of the {worst['name']}: {arrays}")
    return lines


def _time(programs: list[dict[str, Any]]) -> list[str]:
    """FLOPs and seconds of one run of each program, and MFU."""
    head = [
        "program",
        "runs",
        "TFLOP",
        "of model",
        "other dtype",
        "traffic GB",
        "products",
        "traffic",
        "collectives",
        "gaps",
        "one run",
        "MFU",
    ]
    table = [head]
    for p in programs:
        f, t = p["flops"], p["seconds"]
        ratio = f"{f['products'] / f['model']:.2f}x" if f["model"] else "-"
        other = f"{f['other_dtype'] / f['products']:.1%}" if f["products"] else "-"
        cells = [_seconds(t[name]) for name in ("products", "traffic", "collectives", "gaps", "total")]
        mfu = f"{p['mfu']:.1%}" if f["model"] else "-"
        table.append(
            [
                p["name"],
                f"{p['times']:g}",
                f"{f['products'] / 1e12:.3g}",
                ratio,
                other,
                f"{p['traffic_bytes'] / _GB:.3g}",
                *cells,
                mfu,
            ]
        )
    return ["  predicted, each device (of model: padding too, and what is computed again):", *_table(table)]


def _collectives(programs: list[dict[str, Any]]) -> list[str]:
    table = [["program", "collective", "dtype", "of", "count", "GB", "where", "", "alone", "exposed"]]
    for p in programs:
        for c in [c for c in p["collectives"] if c["seconds"] >= 0.002 * p["seconds"]["total"]][:6]:
            way = "async" if c["asynchronous"] else "sync"
            cells = [f"{c['count']:,}", f"{c['bytes'] / _GB:.3g}", f"loop {c['loop']}" if c["loop"] else "once", way]
            table.append(
                [
                    p["name"],
                    c["kind"],
                    c["dtype"],
                    str(c["group"]),
                    *cells,
                    _seconds(c["seconds"]),
                    _seconds(c["exposed"]),
                ]
            )
    if len(table) == 1:
        return ["  collectives: none that take time"]
    lines = ["  collectives, one run:", *_table(table)]
    for p in programs:
        if p["resharding_bytes"] > 0.01 * _GB:
            lines.append(
                f"    {p['name']}: {p['resharding_bytes'] / _GB:.2f} GB move that no parameter or sum asks for"
            )
    return lines


def _seconds(x: float) -> str:
    """Seconds for people.

    >>> _seconds(1.234), _seconds(0.0123), _seconds(2.5e-5), _seconds(0)
    ('1.23 s', '12.3 ms', '0.025 ms', '0')
    """
    if not x:
        return "0"
    return f"{x:.2f} s" if x >= 1 else f"{x * 1e3:.1f} ms" if x >= 1e-3 else f"{x * 1e3:.3f} ms"


def _table(rows: list[list[str]]) -> list[str]:
    """Columns aligned: names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words = [not any(ch.isdigit() for row in rows[1:] for ch in row[i][:1]) for i in range(len(rows[0]))]
    return [
        "    "
        + "  ".join(x.ljust(w) if left else x.rjust(w) for x, w, left in zip(row, widths, words, strict=True)).rstrip()
        for row in rows
    ]

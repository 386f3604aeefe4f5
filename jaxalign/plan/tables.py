"""Numbers, sentences and columns of a page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any

WIDTH = 120  # of a line


def seconds_text(x: float) -> str:
    """Seconds for people.

    >>> seconds_text(1.234), seconds_text(0.0123), seconds_text(2.5e-5), seconds_text(0)
    ('1.23 s', '12.3 ms', '0.025 ms', '0')
    """
    if not x:
        return "0"
    return f"{x:.2f} s" if x >= 1 else f"{x * 1e3:.1f} ms" if x >= 1e-3 else f"{x * 1e3:.3f} ms"


def counted(n: int, thing: str) -> str:
    """A number of things.

    >>> counted(1, "batch"), counted(1200, "batch"), counted(2, "step")
    ('1 batch', '1,200 batches', '2 steps')
    """
    return f"{n:,} {thing}{'' if n == 1 else 'es' if thing.endswith('ch') else 's'}"


def milliseconds(x: float) -> str:
    """Milliseconds, without their name.

    >>> milliseconds(1.234), milliseconds(0.0123), milliseconds(2.5e-5), milliseconds(0)
    ('1,234.0', '12.3', '0.03', '0')
    """
    return f"{x * 1e3:,.1f}" if x >= 1e-3 else f"{x * 1e3:.2f}" if x else "0"


def three_digits(x: float) -> str:
    """Three digits of a number, or all before its point.

    >>> three_digits(1670.2), three_digits(53.44), three_digits(0.277), three_digits(2e-6), three_digits(0)
    ('1,670', '53.4', '0.277', '<0.001', '0')
    """
    return f"{x:,.0f}" if x >= 1000 or not x else f"{x:.3g}" if x >= 1e-3 else "<0.001"


def duration(x: float) -> str:
    """A long time for people.

    >>> duration(12.3), duration(300), duration(3 * 3600 + 720), duration(200_000)
    ('12.3 s', '5.0 min', '3 h 12 min', '2 d 8 h')
    """
    if x < 3600:
        return f"{x / 60:.1f} min" if x >= 100 else seconds_text(x) if x < 10 else f"{x:.1f} s"
    minutes = round(x / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(x / 3600)
    return f"{hours // 24} d {hours % 24} h"


def wrapped(text: str, indent: str = "") -> list[str]:
    """A sentence in lines; those behind the first stand further in."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def aligned(rows: list[list[str]], indent: str = "    ") -> list[str]:
    """Columns: names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    number = re.compile(r"[\d<?-]")
    words = [not any(number.match(row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    return [
        indent
        + "  ".join(x.ljust(w) if left else x.rjust(w) for x, w, left in zip(row, widths, words, strict=True)).rstrip()
        for row in rows
    ]


def gib(size: float) -> str:
    """Bytes in GiB, with as many digits as show that they are not 0.

    >>> gib(73.3 * 2**30), gib(2**20), gib(0)
    ('73.3', '0.00098', '0.0')
    """
    x = size / 2**30
    return f"{x:.1f}" if x >= 0.1 or not x else f"{x:.2g}"


def speed(step: Mapping[str, Any] | None) -> list[str]:
    """Time, MFU and tokens/s of a step, as cells; dashes where there is none."""
    if not step or step["seconds"] is None:
        return ["-"] * 3
    return [seconds_text(step["seconds"]), f"{step['mfu']:.1%}", f"{step['tokens_per_second']:,.0f}"]

"""What the data is, before anything is trained on it."""

from __future__ import annotations

from typing import Any


def data_report(dataset, tally: dict[str, Any]) -> dict[str, Any]:
    return {"records": {"read": tally.get("read", 0), "used": dataset.num_records}}

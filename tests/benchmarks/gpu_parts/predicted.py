"""What `jaxalign plan` predicts for a program that has been timed, and the assumption that the time taken implies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from part import CEILINGS, emit

from jaxalign.parallel.hardware import Hardware, of_kind
from jaxalign.plan.account import CAUSAL, account
from jaxalign.plan.predict import Assumptions, assumptions, predict

# What one device's measurements can settle, each with its bounds. Of two that matter alike the first is meant.
_SETTLED = {
    "attention_efficiency": (1e-6, 1.0),
    "float32_speed": (1e-6, 1.0),
    "efficiency": (1e-6, 1.0),
    "memory_efficiency": (1e-6, 1.0),
    "launch": (1e-9, 1.0),
}


def machine_here() -> Hardware | None:
    """The device's entry in machines.toml; of one without, a CPU, what the part `ceilings` has found."""
    device = jax.local_devices()[0]
    found = of_kind(device.device_kind)
    if found is not None and found.platform:
        return found
    if not {"flops", "bytes"} <= CEILINGS.keys():
        return None
    more = {"platform": jax.default_backend(), "bandwidth": CEILINGS["bytes"], "launch": 1e-6, "link": 1.0}
    return Hardware(device.device_kind, (device.device_kind,), CEILINGS["flops"], **more)


def beside(seconds: float, *programs: tuple[Any, float], visible: float = CAUSAL) -> dict[str, Any]:
    """What a row of the table says of a prediction; nothing where the machine is not known.

    Args:
      seconds: that were measured.
      programs: compiled programs, and how often each ran in that time; a loop that ends by what it finds counts once.
      visible: share of all pairs of a query and a key that attention goes through.
    """
    machine = machine_here()
    if machine is None:
        emit("prediction", note=f"no numbers of {jax.local_devices()[0].device_kind}: add the part ceilings")
        return {}
    counted = [(account(program.as_text(), visible=visible), times) for program, times in programs]
    assumed = assumptions(machine)

    def total(**values: float) -> float:
        changed = Assumptions(machine, {**assumed.values, **values})
        return sum(times * predict(each, changed, jax.local_devices()[:1]).total for each, times in counted)

    expected = total()
    name = max(_SETTLED, key=lambda n: round(abs(math.log(total(**{n: 0.9 * assumed.values[n]}) / expected)), 3))
    value = solved(lambda x: total(**{name: x}), seconds, *_SETTLED[name])
    return {
        "predicted_ms": 1e3 * expected,
        "ratio": seconds / expected,
        "assume": f"{name}={value:.3g}",
        "assumed": f"{assumed.values[name]:.3g}",
        "unexplained": seconds / total(**{name: value}),  # where no value that may be given is enough
    }


def solved(seconds_at: Callable[[float], float], seconds: float, least: float, most: float) -> float:
    """The number that brings a prediction nearest to what was measured; seconds rise with it or fall throughout."""
    falls = seconds_at(least) > seconds_at(most)
    for _ in range(60):
        middle = math.sqrt(least * most)
        if (seconds_at(middle) > seconds) == falls:
            least = middle
        else:
            most = middle
    return math.sqrt(least * most)


def seen_share(rows: Any) -> float:
    """The share of all pairs of a query and a key that rows see."""
    start, end = np.asarray(rows.attend_start, np.int64), np.asarray(rows.attend_end, np.int64)
    return float((end - start).sum()) / start.size / start.shape[1]


class Recorded:
    """A jitted function that remembers the shapes it is called with, so that its programs can be counted."""

    def __init__(self, function: Any):
        self._function = function
        self.calls: list[tuple[Any, Any]] = []

    def __call__(self, *args: Any, **static: Any) -> Any:
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x  # noqa: E731
        self.calls.append((jax.tree.map(shape, args), static))
        return self._function(*args, **static)

    def program(self, args: Any, static: Any) -> Any:
        """The compiled program of a call; one that has run is there, it is not compiled again."""
        return self._function.lower(*args, **static).compile()

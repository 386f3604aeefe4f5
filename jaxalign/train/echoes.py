"""What Orbax's threads print of an error in the background: dropped, since our own thread raises and tells it."""

from __future__ import annotations

import logging
import sys
from typing import Any


def silence_echoes() -> None:
    """Drops the tracebacks that threads and coroutines of Orbax leave behind; a second call changes nothing.

    They log what failed, coroutines that nobody waits for any more are reported as ignored, and TensorStore's callbacks
    find the loop closed that waited for them.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_no_echo)
    if not getattr(sys.excepthook, "without_echoes", False):
        sys.excepthook = _without_echoes(sys.excepthook, _of_a_closed_loop)
    if not getattr(sys.unraisablehook, "without_echoes", False):
        sys.unraisablehook = _without_echoes(sys.unraisablehook, _unheard)


def _no_echo(record: logging.LogRecord) -> bool:
    """Whether a record is to be shown."""
    of_orbax = "orbax" in record.pathname or (record.name == "asyncio" and "orbax" in record.getMessage())
    return not (record.levelno >= logging.ERROR and record.exc_info and of_orbax)


def _of_a_closed_loop(kind: Any, error: Any, trace: Any) -> bool:
    begun = trace.tb_frame.f_code.co_filename if trace else ""
    return kind is RuntimeError and str(error) == "Event loop is closed" and "asyncio" in begun


def _unheard(unraisable: Any) -> bool:
    code = getattr(unraisable.object, "cr_code", None)
    coroutine = code is not None and "orbax" in code.co_filename
    return coroutine or _of_a_closed_loop(unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback)


def _without_echoes(shown: Any, is_echo: Any) -> Any:
    def hook(*said: Any) -> None:
        if not is_echo(*said):
            shown(*said)

    hook.without_echoes = True  # type: ignore[attr-defined]
    return hook

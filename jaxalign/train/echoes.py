"""Silences the tracebacks that Orbax's background threads print, since our own thread raises the error."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from typing import Any


def silence_echoes() -> None:
    """Drops the tracebacks that threads and coroutines of Orbax leave behind; a second call changes nothing.

    They log the error, Python reports abandoned coroutines and futures, and TensorStore's callbacks find their event
    loop closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_no_echo)
    if not getattr(sys.excepthook, "without_echoes", False):
        sys.excepthook = _without_echoes(sys.excepthook, _of_a_closed_loop)
    if not getattr(sys.unraisablehook, "without_echoes", False):
        sys.unraisablehook = _without_echoes(sys.unraisablehook, _unheard)


_READING = re.compile(r"orbax|tensorstore|ocdbt|zarr|/checkpoints/\d", re.IGNORECASE)


def _no_echo(record: logging.LogRecord) -> bool:
    """Whether a record is to be shown."""
    text, of_orbax = record.getMessage(), "orbax" in record.pathname
    if of_orbax and "Metadata file" in text:  # not there, or no JSON: our own thread reads, checks and tells
        return False
    if record.levelno < logging.ERROR:
        return True
    if record.name == "asyncio":
        return not (record.exc_info and _READING.search("".join([text, *traceback.format_exception(*record.exc_info)])))
    return not (of_orbax and record.exc_info)


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

"""An error in the background is told once, by our own thread."""

import logging
import sys
import types

import pytest

from jaxalign.train.echoes import silence_echoes


@pytest.fixture
def hooks(monkeypatch):
    """What comes through both hooks, and through the loggers."""
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *said: shown.append(said[1]))
    monkeypatch.setattr(sys, "unraisablehook", lambda said: shown.append(said.exc_value))
    silence_echoes()
    once = sys.excepthook, sys.unraisablehook
    silence_echoes()
    assert (sys.excepthook, sys.unraisablehook) == once
    return shown


def caught(code, file, error):
    """The error as it comes out of code in such a file."""
    try:
        exec(compile(code, file, "exec"), {"error": error})
    except BaseException as found:
        return type(found), found, found.__traceback__.tb_next


def test_only_a_loop_that_is_closed_in_a_callback_is_dropped(hooks):
    closed, other = RuntimeError("Event loop is closed"), RuntimeError("something else")
    sys.excepthook(*caught("raise error", "lib/asyncio/base_events.py", closed))
    sys.excepthook(*caught("raise error", "mine.py", closed))
    sys.excepthook(*caught("raise error", "lib/asyncio/base_events.py", other))
    assert hooks == [closed, other]


def test_only_coroutines_of_orbax_are_dropped(hooks):
    for file in ("lib/orbax/read.py", "mine.py"):
        space = {}
        exec(compile("async def f(): pass", file, "exec"), space)
        coroutine = space["f"]()
        coroutine.close()
        sys.unraisablehook(_unraisable(coroutine, ValueError, file, None))
    assert hooks == ["mine.py"]


def test_a_closed_loop_in_a_callback_of_no_object_is_dropped(hooks):
    closed = RuntimeError("Event loop is closed")
    sys.unraisablehook(_unraisable(None, *caught("raise error", "lib/asyncio/base_events.py", closed)))
    sys.unraisablehook(_unraisable(None, *caught("raise error", "mine.py", closed)))
    assert hooks == [closed]


def _unraisable(source, kind, error, trace):
    return types.SimpleNamespace(object=source, exc_type=kind, exc_value=error, exc_traceback=trace)


@pytest.mark.parametrize(
    ("code", "file", "error", "kept"),
    [
        ("raise error", "lib/orbax/serialization.py", Exception("Encountered error"), False),
        ("raise ValueError from error", "mine.py", ValueError('Error reading "a" in OCDBT database'), False),
        (None, "", ValueError('NOT_FOUND: Error opening "zarr" driver'), False),
        (None, "", ValueError('Error reading local file "/runs/a/checkpoints/4/state/d/1"'), False),
        ("raise error", "mine.py", ValueError("no zebra"), True),
    ],
)
def test_what_no_future_of_a_checkpoint_was_asked_for_is_dropped(hooks, code, file, error, kept):
    found = caught(code, file, error) if code else (type(error), error, None)
    text = "%s exception was never retrieved\nfuture: %r"
    record = logging.LogRecord("asyncio", logging.ERROR, "asyncio/base.py", 1, text, ("_GatheringFuture", error), found)
    assert bool(logging.getLogger("asyncio").filter(record)) == kept


@pytest.mark.parametrize(
    ("level", "text"),
    [(logging.ERROR, "Failed to json parse Metadata file: %s"), (logging.WARNING, "Metadata file does not exist: %s")],
)
def test_what_orbax_makes_of_a_damaged_description_is_told_by_us(hooks, level, text):
    record = logging.LogRecord("absl", level, "lib/orbax/metadata.py", 1, text, ("x",), None)
    assert not logging.getLogger("absl").filter(record)


def test_logged_tracebacks_of_orbax_are_dropped(hooks):
    logger = logging.getLogger("absl")
    for path in ("lib/orbax/future.py", "mine.py"):
        record = logging.LogRecord("absl", logging.ERROR, path, 1, "failed", (), (ValueError, ValueError(), None))
        assert bool(logger.filter(record)) == (path == "mine.py")
    warning = logging.LogRecord("absl", logging.WARNING, "lib/orbax/x.py", 1, "told", (), None)
    assert logger.filter(warning)

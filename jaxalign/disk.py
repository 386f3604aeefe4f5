"""Atomic writes: a full disk or an unwritable path becomes an InputError, and no partial file is left."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxalign.errors import InputError

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_TEXTS = tuple(os.strerror(number) for number in _NUMBERS)  # how libraries in C++ tell the same


def trouble(error: BaseException) -> str | None:
    """The system's reason why it cannot write; None for any other error.

    >>> trouble(ValueError("INTERNAL: write failed: No space left on device"))
    'No space left on device'
    >>> trouble(ValueError("no room"))
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        e = waiting.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, OSError) and e.errno in _NUMBERS:
            return os.strerror(e.errno)
        text = str(e)
        if isinstance(e, OSError) and "requested and" in text and "written" in text:  # numpy, to a full disk
            return os.strerror(errno.ENOSPC)
        for words in _TEXTS:
            if words in text:
                return words
        waiting += [e.__cause__, e.__context__, *getattr(e, "exceptions", ())]
    return None


def cannot_write(path: Any, words: str) -> InputError:
    """The error that says so."""
    remedy = {
        os.strerror(errno.EFBIG): "ulimit -f shows the limit on a file's size",
        os.strerror(errno.EROFS): "mount it for writing",
        os.strerror(errno.EIO): "see what dmesg says of the disk",
    }.get(words, f"make room there (df -h {path})")
    return InputError(
        f"{path}: {words}",
        "a place with room to write; what was saved before is still there and whole",
        f"{remedy}, then run the same command again: it resumes from the last checkpoint, where there is one",
    )


@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
    """Turns a full or failing disk in the block into an InputError that names the path; other errors pass through."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        words = trouble(error)
        if words is None:
            raise
        raise cannot_write(path, words) from error


def write_whole(path: Any, data: str | bytes) -> None:
    """Writes a file atomically: readers see the old file or the new one, and a full disk keeps the old one.

    Args:
      path: a `pathlib.Path` or an `epath.Path`; an object appears when it is complete.
      data: text is written as UTF-8.

    Raises:
      InputError: no room.
    """
    raw = data.encode() if isinstance(data, str) else data
    with writing(path):
        if "://" in os.fspath(path):
            path.write_bytes(raw)
            return
        path = os.path.realpath(path)  # a link is written through
        if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe must not be replaced
            with open(path, "wb") as file:
                file.write(raw)
            return
        draft = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}.tmp")
        try:
            with open(draft, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise


def check_out(out: str, flag: str = "--out") -> None:
    """Checks, before the work, that a file can be written; leaves nothing there.

    Args:
      out: the file.
      flag: that names it.

    Raises:
      InputError: it cannot.
    """
    path = Path(out).expanduser()
    try:
        there = path.exists()
        # A pipe that nobody reads is refused, not waited for.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666))
        if not there:
            path.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        words = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{flag} {out}: {words}", "a file that can be written", f"{flag} FILE.json") from error

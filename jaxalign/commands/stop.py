"""Ctrl-C and SIGTERM while a compiler works: an end at once, with a word, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS = 0.2  # between two looks at whether the work is done


@contextlib.contextmanager
def at_once(scratch: str) -> Iterator[list[str]]:
    """Ends the process at the first of these signals, though its main thread is in a compiler for minutes.

    Python's own handlers wait until the compiler comes back, and those that it installs print its stack. So the
    signals are blocked, here and in all threads that are begun from here, and one thread waits for them.

    Args:
      scratch: where temporary files are put meanwhile; it is removed at such an end.

    Yields:
      A list for the names of files that are written, which are told at such an end.
    """
    written: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield written
        return
    old, before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS), tempfile.tempdir
    done = threading.Event()
    waiting = threading.Thread(target=_wait, args=(scratch, done, written), daemon=True)
    tempfile.tempdir = scratch
    waiting.start()
    try:
        yield written
    finally:
        done.set()
        waiting.join()
        tempfile.tempdir = before
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _wait(scratch: str, done: threading.Event, written: list[str]) -> None:
    while not done.is_set():
        found = signal.sigtimedwait(_SIGNALS, _SECONDS)
        if found is not None:
            word = "interrupted" if found.si_signo == signal.SIGINT else "ended by SIGTERM"
            files = f"{' and '.join(written) or 'nothing'} was written"
            os.write(2, f"\njaxalign plan: {word}; {files}\n".encode(errors="replace"))
            shutil.rmtree(scratch, ignore_errors=True)
            os._exit(128 + found.si_signo)

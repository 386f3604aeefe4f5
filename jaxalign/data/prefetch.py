"""Prefetches batches in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(make: Callable[[int], T], start: int, stop: int | None, *, depth: int) -> Iterator[tuple[int, T]]:
    """Yields (index, make(index)) for start <= index < stop; a thread keeps up to `depth` of them ready.

    An exception in `make` is raised where its batch would have come, after all earlier ones; the stream never ends
    for another reason than `stop`.  Closing the generator ends the thread.

    Args:
      make: a function of the index.
      start: first index.
      stop: one past the last; None for no end.
      depth: items ready ahead of the reader; 0 makes each when it is asked for.

    >>> list(prefetch(lambda i: i * i, 2, 5, depth=2))
    [(2, 4), (3, 9), (4, 16)]
    """
    if depth < 1:
        index = start
        while stop is None or index < stop:
            yield index, make(index)
            index += 1
        return
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        index = start
        try:
            while not closed.is_set() and (stop is None or index < stop):
                put((index, make(index), None))
                index += 1
            put((index, None, None))
        except BaseException as error:  # re-raised in the reader
            put((index, None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        expected = start
        while stop is None or expected < stop:
            index, item, error = ready.get()
            if error is not None:
                raise error
            yield index, item
            expected += 1
    finally:
        closed.set()
        thread.join(timeout=5)

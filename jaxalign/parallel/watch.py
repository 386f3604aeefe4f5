"""Heartbeats between a run's processes: when one is lost, the others say which and exit instead of hanging."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxalign.errors import InputError

_BEATS, _LOST = "jaxalign/beats/", "jaxalign/lost"
_STORE = "process 0, which the others meet at ({})"
_AGAIN = "the same command, started again for all processes, resumes from the last checkpoint"
_SLICE = 1.0  # seconds that a request to process 0 waits
_REFUSED = 10.0  # seconds for which process 0 refuses connections before it counts as lost
# What libraries say when another process does not answer.
_SILENCE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|socket closed|coordination|heartbeat|unavailable|barrier", re.I
)


class Watch:
    """A thread that sends heartbeats through the runtime's key-value store and checks those of the others.

    Process 0, where that store is, notes whose signs stay away and tells all; whoever cannot reach the store any more
    knows that process 0 is lost. The runtime's own heartbeat would end the process with a stack of C++ and no name.
    """

    def __init__(self, client: Any, index: int, count: int, timeout: float):
        """
        Args:
          client: of the distributed runtime.
          index: of this process.
          count: of all processes.
          timeout: seconds without a sign after which a process counts as lost.
        """
        self._client, self._index, self._count, self._timeout = client, index, count, timeout
        self._every = min(5.0, timeout / 6)
        self._doubt = False
        self._ended = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()
        if index:
            threading.Thread(target=self._hold, name="watch of process 0", daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join(timeout=2 * _SLICE)

    def wait(self, error: BaseException) -> None:
        """Waits for the thread to find out who is lost, which ends this process; returns where nobody is."""
        self._doubt = True
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        _say(f"another process does not answer ({first}); waiting to learn which")
        self._thread.join(timeout=self._timeout + 2 * self._every)

    def _work(self) -> None:
        number, start = 0, time.monotonic()
        failing: float | None = None
        while not self._ended.is_set():
            try:
                number += 1
                sign = f"{number} process {self._index} (pid {os.getpid()} on {socket.gethostname()})"
                self._client.key_value_set(f"{_BEATS}{self._index}", sign, allow_overwrite=True)
                if self._index == 0 and (lost := self._silent(start)):
                    self._client.key_value_set(_LOST, lost, allow_overwrite=True)
                    time.sleep(2 * _SLICE)  # the store ends with this process: the others read it first
                    self._end(lost)
                if self._index and (lost := self._news()):
                    self._end(lost)
                failing = None
            except Exception:
                if self._ended.is_set():
                    return
                now = time.monotonic()
                failing = now if failing is None else failing
                if now - failing > self._timeout:
                    self._end(_STORE.format(_address()))
            if self._index == 0:
                self._ended.wait(self._every)

    def _hold(self) -> None:
        """Keeps a connection to process 0: it breaks at once where that is killed, and the runtime gives no time.

        So the words come first, and the end only when process 0 has refused for a while: a proxy that restarts between
        two hosts refuses, too.
        """
        host, _, port = _address().rpartition(":")
        refused: float | None = None
        while not self._ended.is_set():
            begun = time.monotonic()
            try:
                with socket.create_connection((host.strip("[]"), int(port)), timeout=self._timeout) as line:
                    refused = None
                    line.settimeout(None)
                    while line.recv(4096):  # what its server says to a stranger
                        pass
            except ConnectionRefusedError:
                if refused is None:
                    refused = begun
                    _say(f"{_STORE.format(_address())} refuses connections. Where it was killed: {_AGAIN}")
                if begun - refused > _REFUSED:
                    self._end(_STORE.format(_address()))
            except OSError:
                pass
            # Servers hang up on who says nothing: then they are called again, but never in haste.
            self._ended.wait(0.01 if time.monotonic() - begun > _SLICE else _SLICE / 5)

    def _news(self) -> str:
        """What process 0 has told, "" for nothing; takes as long as two beats are apart."""
        until = time.monotonic() + self._every
        while not self._ended.is_set() and time.monotonic() < until:
            try:
                return self._client.blocking_key_value_get(_LOST, int(1000 * min(_SLICE, self._every)))
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        return ""

    def _silent(self, start: float) -> str:
        """The processes whose heartbeats are overdue, in words."""
        now = time.monotonic()
        for key, value in self._client.key_value_dir_get(_BEATS):
            index = int(key.rpartition("/")[2])
            if self._seen.get(index, ("", 0.0))[0] != value:
                self._seen[index] = (value, now)
        limit = min(self._timeout, 4 * self._every) if self._doubt else self._timeout
        late = [i for i in range(1, self._count) if now - self._seen.get(i, ("", start))[1] > limit]
        names = [self._seen[i][0].partition(" ")[2] if i in self._seen else f"process {i}" for i in late]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    def _end(self, lost: str) -> None:
        """Names the lost process and exits: a collective in progress waits for it and cannot be cancelled."""
        if self._ended.is_set():
            return
        error = InputError(
            f"lost: {lost}: killed, crashed, or cut off; {self._count} processes work together on this run",
            "all of them; what was saved is whole",
            f"look at the end of what that process printed; {_AGAIN} (process_timeout, now {self._timeout:g} s, says "
            "how long a silent one is waited for)",
        )
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        _say(f"\njaxalign: the run ends on process {self._index}\n{error}")
        os._exit(1)


@contextlib.contextmanager
def watched(timeout: float) -> Iterator[None]:
    """Watches the other processes in the block; with one process, does nothing.

    Args:
      timeout: seconds without a heartbeat after which a process counts as lost.
    """
    from jax._src.distributed import global_state

    if jax.process_count() == 1 or global_state.client is None:
        yield
        return
    watch = Watch(global_state.client, jax.process_index(), jax.process_count(), timeout)
    try:
        yield
    except Exception as error:
        if not isinstance(error, InputError) and _SILENCE.search(f"{type(error).__name__} {error}"):
            watch.wait(error)
        raise
    finally:
        watch.close()


def _say(text: str) -> None:
    """One unbuffered write: the runtime may end the process at any moment."""
    os.write(2, f"{text}\n".encode())


def _address() -> str:
    from jax._src.distributed import global_state

    return str(global_state.coordinator_address)

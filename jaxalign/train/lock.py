"""The lock of a run's directory: one process at a time; a killed process leaves no lock behind."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from jaxalign.errors import InputError
from jaxalign.parallel.processes import is_main, on_main, say
from jaxalign.train.rundir import as_path, beside, usable

try:
    import fcntl
except ImportError:  # no POSIX: the record alone locks, as in an object store
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
BEAT = 10.0  # seconds between two signs of life
EXPIRY = 60.0  # without one for so long, another host's lock is a dead process's
_SETTLE = 2.0  # after which the last of several writers to an object store is known
_SIZE = 512  # bytes of a record: written in place, never longer or shorter

_open_files: set[int] = set()


def _close_in_child() -> None:
    """A forked child that outlives the run must not hold the lock."""
    for fd in _open_files:
        os.close(fd)
    _open_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class Lock:
    """The file `.lock` in a directory, which says who works there.

    On a disk the system's own lock on that file decides among the processes of a host: it ends with its process,
    however that ends, containers and reused process ids included, so that a run that was killed starts again at once.
    A holder also changes the record every `BEAT` seconds; one of another host, or of before a reboot, that is not seen
    to change for `EXPIRY` seconds is nobody's. Clocks of two hosts are never compared.

    Object stores know no locks, some network file systems neither: there the record alone decides, a process of the
    same host by its id and start time, any other by the beat. Of processes that write it at once the last one has it,
    which each sees when it looks again after a moment, or at its next beat. Two that start within the moment in which
    an upload is under way may so work side by side until then, `BEAT` seconds at most.
    """

    def __init__(self, directory: Any):
        """
        Args:
          directory: an `epath.Path`; made when it does not exist.
        """
        remote = "://" in os.fspath(directory)
        self.directory = directory if remote else as_path(os.path.abspath(os.fspath(directory)))
        self.lost = False  # another process has taken it over
        self._fd: int | None = None
        self._taken = self._made = False
        self._ended = threading.Event()
        self._beats = 0
        self._me = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname()[:64],
            "boot": _boot(),
            "pid_namespace": _pid_namespace(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "since": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        }

    @property
    def path(self) -> Any:
        """The file."""
        return self.directory / NAME

    def take(self) -> None:
        """Takes the lock, at once or, where another host's may be dead, after `EXPIRY` seconds at most.

        Raises:
          InputError: another process works in the directory.
        """
        remote = "://" in os.fspath(self.directory)
        with usable(self.directory, f"--config.workdir={'BUCKET_URL/NAME' if remote else 'runs/NAME'}"):
            self._made = not remote and not self.directory.exists()
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                while not self._try(remote):
                    pass
            except BaseException:
                self._close()
                raise
        self._taken = True
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _try(self, remote: bool) -> bool:
        """One try; False to try again, because the file has changed under it."""
        self._close()
        ours = None if remote else self._lock_file()
        raw = self._read()
        holder = _parsed(raw)
        if ours is False:
            time.sleep(0.2)  # the process that has just locked it is about to write its record
            if (new := self._read()) != raw or not new.strip():
                raise self._in_use(_parsed(new))
        here = holder.get("boot") == self._me["boot"]
        if ours is None and here and holder.get("pid_namespace") == self._me["pid_namespace"]:
            held = _started(holder.get("pid")) == holder.get("started") is not None
        elif ours is None or not here:
            held = bool(raw.strip()) and self._lives(raw, holder)
        else:
            held = not ours
        if held:
            raise self._in_use(holder)
        if ours is False:  # the lock of a dead host, which the file's server still holds: a new file in its place
            self.path.unlink(missing_ok=True)
            return False
        if ours and not self._is_file():
            return False
        self._write()
        if ours is None:
            time.sleep(_SETTLE)
            if (now := _parsed(self._read())).get("token") != self._me["token"]:
                raise self._in_use(now)
        return True

    def release(self) -> None:
        """Gives the lock back; without effect where it is not held."""
        self._ended.set()
        if self._taken:
            self._taken = False
            with contextlib.suppress(OSError):
                if self._is_own():
                    self.path.unlink()
                if self._made:
                    os.rmdir(self.directory)  # where nothing came to be in it
        self._close()

    def check(self) -> None:
        """Makes sure that the directory is still this process's.

        Raises:
          InputError: another process has taken over, after this one gave no sign of life for `EXPIRY` seconds.
        """
        if self.lost:
            raise InputError(
                f"{self.directory} was taken over by {_words(_parsed(self._read()))}",
                f"one process at a time in a run's directory, that is stopped for less than {EXPIRY:.0f} s",
                "leave it to that process; what was saved is there, and the same command resumes when it has ended",
            )

    def _in_use(self, holder: dict[str, Any]) -> InputError:
        stop = f"stop it (on {holder['host']}: kill {holder['pid']}; it saves first)" if "pid" in holder else "stop it"
        return InputError(
            f"{self.directory} is in use: {_words(holder)} works in it",
            "one process at a time in a run's directory",
            f"wait until that one has ended, or {stop}; or --config.workdir={beside(self.directory)}",
        )

    def _lives(self, raw: bytes, holder: dict[str, Any]) -> bool:
        """Whether the record of a process that cannot be asked changes."""
        left = EXPIRY - self._age()
        if left > 0:
            say(f"{self.directory}: {_words(holder)} worked in it; waiting up to {left:.0f} s to see whether it lives")
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(min(1.0, EXPIRY / 10))
            if self._read() not in (raw, b""):
                return True
        return False

    def _age(self) -> float:
        """Seconds since the record was written, by the file system's own clock; 0 where that cannot be asked."""
        if "://" in os.fspath(self.directory):
            return 0.0
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix=NAME) as probe:
            return max(os.fstat(probe.fileno()).st_mtime - os.stat(self.path).st_mtime, 0.0)

    def _lock_file(self) -> bool | None:
        """Opens and locks the file: True, False where another process has it, None where nothing can be locked."""
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        _open_files.add(self._fd)
        if fcntl is None:
            return None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def _is_file(self) -> bool:
        """Whether the open file is still the one of that name."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        assert self._fd is not None
        mine = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _is_own(self) -> bool:
        return _parsed(self._read()).get("token") == self._me["token"]

    def _read(self) -> bytes:
        """The record as it is now: opened anew, as network file systems want it."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def _write(self) -> None:
        self._beats += 1
        raw = json.dumps({**self._me, "beats": self._beats}).encode().ljust(_SIZE - 1) + b"\n"
        if self._fd is None:
            self.path.write_bytes(raw)
            return
        os.pwrite(self._fd, raw, 0)
        os.fsync(self._fd)

    def _beat(self) -> None:
        """Signs of life, until the lock is given back."""
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # a store that is away for a moment; the next beat tries again
                now = self._read()
                if now.strip() and _parsed(now).get("token") != self._me["token"]:
                    self.lost = True
                    return
                if not self._ended.is_set():
                    self._write()

    def _close(self) -> None:
        if self._fd is not None:
            _open_files.discard(self._fd)
            os.close(self._fd)  # which unlocks
            self._fd = None


@contextlib.contextmanager
def exclusive(directory: Any) -> Iterator[Lock]:
    """Holds a directory's lock in the block, for all processes of the run: process 0 has it.

    Args:
      directory: an `epath.Path`; made when it does not exist.

    Raises:
      InputError: another run works in it; on every process.
    """
    lock = Lock(directory)
    on_main(lock.take)
    try:
        yield lock
    finally:
        if is_main():
            lock.release()


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _words(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder.get('host')}, since {holder.get('since')},"


def _boot() -> str:
    """What tells this host, since it was started, from others; containers on it share it."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def _pid_namespace() -> str:
    """Where process ids mean the same."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: Any) -> str | None:
    """When a process was started, None where there is none: an id may be another process's by now."""
    try:
        with open(f"/proc/{int(pid)}/stat", encoding="ascii", errors="replace") as file:
            state, *rest = file.read().rpartition(")")[2].split()
            return None if state in "ZX" else rest[18]  # what has ended and is not yet collected holds nothing
    except OSError:
        pass
    except (TypeError, ValueError, IndexError):
        return None
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "running"

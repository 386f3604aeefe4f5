"""One process at a time works in a run's directory, and a dead one does not lock it."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from run_child import CONTEXT

from jaxalign.errors import InputError
from jaxalign.train import lock as module
from jaxalign.train.lock import NAME, Lock, exclusive


def hold(directory, ready, child=False):
    """Takes the lock and keeps it; `child`: is killed, and leaves a child of its own behind."""
    os.setsid()
    Lock(directory).take()
    if not child or os.fork() == 0:
        ready.set()
    else:
        ready.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)


def start_holder(directory, **options):
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(directory, ready), kwargs=options)
    process.start()
    assert ready.wait(120)
    return process


@pytest.fixture
def holder(tmp_path):
    """A process of its own that holds the lock of `tmp_path`."""
    process = start_holder(tmp_path)
    yield process
    process.kill()
    process.join()


@pytest.fixture
def no_system_locks(monkeypatch):
    """As on file systems that cannot lock."""
    monkeypatch.setattr(module, "fcntl", None)
    monkeypatch.setattr(module, "_SETTLE", 0.05)


@pytest.fixture
def quick(monkeypatch):
    """Beats and expiry in moments."""
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "EXPIRY", 1.0)


def record(**changes):
    mine = Lock(Path("/tmp"))._me
    return json.dumps({**mine, "token": "other", "host": "elsewhere", **changes}).ljust(511) + "\n"


def test_a_second_process_is_refused_with_who_and_what_to_do(tmp_path, holder):
    with pytest.raises(InputError, match=f"process {holder.pid} on ") as error:
        Lock(tmp_path).take()
    assert "since 20" in error.value.found and str(tmp_path) in error.value.found
    assert f"kill {holder.pid}" in error.value.fix and f"workdir={tmp_path}-2" in error.value.fix


def test_after_a_kill_it_is_free_at_once(tmp_path, holder):
    holder.kill()
    holder.join()
    assert (tmp_path / NAME).exists()
    Lock(tmp_path).take()


def test_a_stopped_process_still_holds_it(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(InputError, match="in use"):
        Lock(tmp_path).take()


@pytest.mark.parametrize("end", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_however_the_block_ends_it_is_released(tmp_path, end):
    with pytest.raises(end), exclusive(tmp_path):
        with pytest.raises(InputError, match=f"process {os.getpid()}"):
            Lock(tmp_path).take()  # nor twice in one process
        raise end
    assert os.listdir(tmp_path) == []
    with exclusive(tmp_path):
        pass


def test_a_forked_child_that_lives_on_does_not_hold_it(tmp_path):
    parent = start_holder(tmp_path, child=True)
    parent.join()
    try:
        assert parent.exitcode == -signal.SIGKILL
        Lock(tmp_path).take()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)


def test_of_many_that_start_at_once_one_has_it(tmp_path):
    won, refused, gate = [], [], threading.Barrier(8)

    def start():
        lock = Lock(tmp_path)
        gate.wait()
        try:
            lock.take()
            won.append(lock)
        except InputError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 7
    won[0].release()


def test_another_hosts_lock_holds_while_it_beats(tmp_path, quick, capsys):
    path, ended = tmp_path / NAME, threading.Event()
    path.write_text(record(boot="another", beats=0))

    def beat():
        count = 0
        while not ended.wait(0.05):
            count += 1
            path.write_text(record(boot="another", beats=count))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError, match="on elsewhere"):
            Lock(tmp_path).take()
    finally:
        ended.set()
        thread.join()
    assert "to see whether it lives" in capsys.readouterr().err  # the wait is told
    lock = Lock(tmp_path)
    lock.take()  # it beats no more
    assert json.loads(path.read_text())["host"] != "elsewhere"


def test_another_hosts_old_lock_is_free_at_once(tmp_path, capsys):
    path = tmp_path / NAME
    path.write_text(record(boot="another"))
    os.utime(path, (time.time() - 100, time.time() - 100))
    Lock(tmp_path).take()
    assert capsys.readouterr().err == ""


def test_a_torn_record_is_nobodys(tmp_path, quick):
    (tmp_path / NAME).write_bytes(b'{"pid": 1\x00\x00')
    Lock(tmp_path).take()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_beats_change_the_record_and_a_lock_taken_over_is_lost(tmp_path, quick):
    lock = Lock(tmp_path)
    lock.take()
    path, deadline = tmp_path / NAME, time.monotonic() + 60
    first = path.read_text()
    while path.read_text() == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert json.loads(path.read_text())["beats"] > 1 and len(path.read_text()) == len(first)
    lock.check()
    path.unlink()  # as one does whose watch found it silent
    path.write_text(record(boot="another"))
    while not lock.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(InputError, match=r"taken over by process .* on elsewhere"):
        lock.check()
    lock.release()
    assert json.loads(path.read_text())["token"] == "other"  # not ours to remove


def test_without_system_locks_the_process_itself_is_asked(tmp_path, holder, no_system_locks):
    with pytest.raises(InputError, match=f"process {holder.pid}"):
        Lock(tmp_path).take()
    kept = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({**kept, "started": "17"}))  # an id that another process has now
    Lock(tmp_path).take()


def test_without_system_locks_a_killed_process_is_none(tmp_path, holder, no_system_locks):
    holder.kill()
    holder.join()
    Lock(tmp_path).take()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_in_an_object_store(store, quick, monkeypatch):
    monkeypatch.setattr(module, "_SETTLE", 0.05)
    from jaxalign.train.rundir import RunDir

    path = RunDir("s3://bucket/run").path
    with exclusive(path):
        with pytest.raises(InputError, match=f"process {os.getpid()}"):
            Lock(path).take()
    assert not (path / NAME).exists()
    path.mkdir(parents=True, exist_ok=True)
    (path / NAME).write_text(record(boot="another"))
    Lock(path).take()  # after it was seen not to beat
    write = Lock._write

    def overtaken(self):  # another writes a moment later
        write(self)
        self.path.write_text(record(boot="another"))

    monkeypatch.setattr(Lock, "_write", overtaken)
    (path / NAME).unlink()
    with pytest.raises(InputError, match="on elsewhere"):
        Lock(path).take()

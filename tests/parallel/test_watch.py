"""Whose signs of life stay away, and how it is told."""

import socket
import threading
import time

import pytest

from jaxalign.parallel import watch as module
from jaxalign.parallel.watch import Watch


class Store:
    """The runtime's key-value store."""

    def __init__(self):
        self.values, self.error = {}, None

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite
        self._fail()
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(k, v) for k, v in list(self.values.items()) if k.startswith(prefix)]

    def blocking_key_value_get(self, key, milliseconds):
        self._fail()
        if key in self.values:
            return self.values[key]
        time.sleep(0.01)
        raise RuntimeError("DEADLINE_EXCEEDED: nothing yet")

    def _fail(self):
        if self.error is not None:
            raise RuntimeError(self.error)


@pytest.fixture
def ended(monkeypatch):
    """What watches end their process with."""
    said, told = [], threading.Event()

    def end(self, lost):
        if not self._ended.is_set():
            said.append((self._index, lost))
            self._ended.set()
            told.set()

    monkeypatch.setattr(Watch, "_end", end)
    monkeypatch.setattr(module, "_SLICE", 0.05)
    return lambda: told.wait(60) and said


@pytest.fixture
def server(monkeypatch):
    """Where process 0 listens."""
    with socket.create_server(("localhost", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setattr(module, "_address", lambda: f"localhost:{port}")
        yield listening


def test_process_0_tells_all_who_is_silent(ended, server):
    store = Store()
    watches = [Watch(store, index, 3, 0.6) for index in (0, 1)]
    for watch in watches:
        watch._thread.join(60)
    found = dict(ended())
    assert "process 2" in found[0] and found[1] == found[0]


def test_who_gave_a_sign_is_named_by_it(ended):
    store = Store()
    store.values["jaxalign/beats/1"] = "7 process 1 (pid 5 on there)"  # and never again
    Watch(store, 0, 2, 0.3)
    assert ended() == [(0, "process 1 (pid 5 on there)")]


@pytest.mark.parametrize("error", ["UNAVAILABLE: Socket closed", "DEADLINE_EXCEEDED: no answer"])
def test_a_store_that_does_not_answer_is_process_0(ended, server, error):
    store = Store()
    store.error = error
    Watch(store, 1, 2, 0.3)
    assert ended()[0][1].startswith("process 0, which the others meet at (localhost:")


def test_a_connection_that_breaks_is_process_0(ended, server, monkeypatch, capfd):
    monkeypatch.setattr(module, "_REFUSED", 0.2)
    watch = Watch(Store(), 1, 2, 60)
    server.accept()[0].close()  # it hangs up, but is there
    again, _ = server.accept()
    assert not watch._ended.is_set()
    server.close()
    again.close()
    assert ended()[0][1].startswith("process 0")
    assert "resumes" in capfd.readouterr().err  # said before the end


def test_a_proxy_that_restarts_ends_nothing(ended, server, capfd):
    watch = Watch(Store(), 1, 2, 60)
    line, _ = server.accept()
    address = server.getsockname()
    server.close()
    line.close()
    while "refuses" not in capfd.readouterr().err:
        time.sleep(0.01)
    with socket.create_server(address) as again:
        again.accept()
        assert not watch._ended.is_set()
        watch._ended.set()

"""What a Ctrl-C prints on a terminal."""

import gc
import os
import signal
import sys

import pytest

from jaxalign.train.interrupts import StopRequests


@pytest.mark.parametrize("terminal", [True, False])
def test_the_words_begin_a_line_of_their_own(terminal):
    reader, writer = os.openpty() if terminal else os.pipe()
    kept = os.dup(2)
    os.dup2(writer, 2)
    try:
        os.write(2, b"sft  step 3/9")  # as a progress bar leaves it
        with StopRequests() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.at(1) == signal.SIGINT
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    said = b""
    while not said.endswith(b"at once\n"):  # a terminal gives what it has by and by
        said = (said + os.read(reader, 1000)).replace(b"\r\n", b"\n")
    os.close(writer)
    os.close(reader)
    assert (b"step 3/9\nstopping" in said) == terminal


def test_a_second_ctrl_c_that_lands_in_the_garbage_collector_is_neither_lost_nor_a_traceback(capfd):
    def collecting(phase, info):  # what it raises goes nowhere, as in JAX's own callback
        if phase == "start":
            signal.raise_signal(signal.SIGINT)

    before = sys.unraisablehook
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.at(1) == signal.SIGINT
        gc.callbacks.append(collecting)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(collecting)
        with pytest.raises(KeyboardInterrupt):
            stop.at(1)
    said = capfd.readouterr().err
    assert "Traceback" not in said and "ignored" not in said
    assert sys.unraisablehook is before

"""What a Ctrl-C prints on a terminal."""

import os
import signal

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

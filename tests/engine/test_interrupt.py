import os
import signal
import threading

import pytest

from replknet.engine import interrupt
from replknet.engine.interrupt import StopRequest


def test_first_signal_asks_and_a_later_ctrl_c_acts(monkeypatch):
    clock = iter([100.0, 100.5, 103.0])
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: next(clock))
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the echo of a launcher
        assert stop.requested()
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in interrupt.SIGNALS] != before
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with StopRequest() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.requested()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, False)]

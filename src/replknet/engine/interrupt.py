"""SIGTERM and Ctrl-C as a request to stop at the next safe point."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_OF_ECHO = 2.0  # torchrun passes on a Ctrl-C that the terminal has already delivered


class StopRequest:
    """Context in which SIGTERM or Ctrl-C only sets ``signal``; a second Ctrl-C acts at once.

    Outside the main thread (some launchers) signals are left to the launcher.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._received = 0.0
        self._previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._received = number, now
        elif number == signal.SIGINT and now - self._received > SECONDS_OF_ECHO:
            raise KeyboardInterrupt

"""Times of native calls, for whoever asks in a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Time = TypeVar("Time")


@contextmanager
def collected(times: ContextVar[list[Time] | None]) -> Iterator[list[Time]]:
    """A new list, the variable's in the ``with`` block, in this thread or asynchronous task."""
    collection: list[Time] = []
    token = times.set(collection)
    try:
        yield collection
    finally:
        times.reset(token)

"""Memory that a call takes, measured by the operating system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def why_not_measurable() -> str:
    """Why ``peak_bytes`` cannot measure here; empty where it can."""
    if not _STATUS.exists() or not _CLEAR_REFS.exists():
        return f"peak memory is read from /proc, which {sys.platform} does not have"
    return ""


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes resident during ``call`` above those before it.

    Memory that earlier calls left with the allocator counts as free where it gives it back: use a
    fresh process.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the C library of the process
    if trim is not None:
        trim(0)
    before = _status("VmRSS")
    _CLEAR_REFS.write_text("5")  # the peak starts again from what is resident now
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    value = next(line.split()[1] for line in lines if line.startswith(field + ":"))
    return 1024 * int(value)

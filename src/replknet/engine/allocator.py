"""Memory of training steps on the CPU."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, to be used again; where it is not glibc, nothing.

    Each step allocates the activations of the one before. By default, glibc returns large blocks
    to the system when they are freed, and every page of the next step is cleared and mapped anew.
    """
    if has_mallopt():
        library = _c_library()
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def has_mallopt() -> bool:
    """Whether the C library is glibc, whose memory this module adjusts."""
    return hasattr(_c_library(), "mallopt")


def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)  # the process itself, whose C library that is

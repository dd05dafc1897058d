"""Weights side by side in memory of their own, in large pages where the system has them.

Every call reads all weights once: with pages of 4 KiB their addresses do not fit the processor's
tables.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import nn

ALIGNMENT = 64
"""Bytes; a cache line, which kernels read at once."""


def consolidate(modules: Iterable[nn.Module]) -> None:
    """Move the buffers that ``modules`` hold themselves, contiguous and on the CPU, to one arena.

    Values stay, and so do buffers that are shared. The arena lives as long as one of them does;
    copies of a module and what is unpickled have ordinary memory. Does nothing where the system
    does not take advice about pages.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    places = [
        (module, name, buffer)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.numel()
    ]
    offsets: dict[int, int] = {}
    size = 0
    for _, _, buffer in places:
        if id(buffer) not in offsets:
            offsets[id(buffer)] = size
            size += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    if not size:
        return
    arena = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    arena.madvise(mmap.MADV_HUGEPAGE)
    moved: dict[int, torch.Tensor] = {}
    for module, name, buffer in places:
        offset = offsets[id(buffer)]
        if offset not in moved:
            flat = torch.frombuffer(arena, dtype=buffer.dtype, count=buffer.numel(), offset=offset)
            moved[offset] = flat.view(buffer.shape).copy_(buffer)
        module._buffers[name] = moved[offset]

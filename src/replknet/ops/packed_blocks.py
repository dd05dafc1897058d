"""Residual blocks of large-kernel networks, many in one native call.

Between two layers the caches hold weights and pixels, and Python finds nothing of its own there: a
layer called from it costs several times what it costs in a loop of nothing else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from replknet.ops import _binary
from replknet.ops.native import NativeAlgorithm, PreparedFilters, check, library
from replknet.ops.packed_pointwise import Layer
from replknet.ops.prepared import Forward
from replknet.ops.times import collected

_times: ContextVar[list[float] | None] = ContextVar("replknet_large_kernel_times", default=None)


@dataclass(frozen=True)
class LargeKernel:
    """A depthwise convolution that keeps the size of its map, with bias and optional ReLU."""

    struct: _binary.ProblemStruct
    filters: PreparedFilters
    bias: Tensor | None


@dataclass(frozen=True)
class Block:
    """``second(large_kernel(first(x))) + x``; if there is no large kernel, without it."""

    first: Layer
    second: Layer
    large_kernel: LargeKernel | None = None

    def struct(self) -> _binary.BlockStruct:
        block = _binary.BlockStruct(self.first.struct(), self.second.struct())
        if (kernel := self.large_kernel) is not None:
            filters, spectra, bias = kernel.filters.packed, kernel.filters.spectra, kernel.bias
            block.large_kernel = ctypes.pointer(kernel.struct)
            block.filters = filters.data_ptr()
            block.spectra = None if spectra is None else spectra.data_ptr()
            block.bias = None if bias is None else bias.data_ptr()
        return block


def large_kernel(
    forward: Forward, batch: int, bias: Tensor | None, relu: bool
) -> LargeKernel | None:
    """One for ``Blocks``, if its algorithm is native and it keeps the size of the map."""
    problem = forward.for_batch(batch)
    if not isinstance(forward.filters, PreparedFilters):
        return None
    if problem.output_size != (problem.height, problem.width):
        return None
    native = cast(NativeAlgorithm, forward.algorithm)
    return LargeKernel(native.prepared_struct(problem, relu), forward.filters, bias)


class Blocks:
    """Residual blocks, at least one, as the native core takes them.

    They hold addresses: a tensor that moves needs new ones.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = tuple(blocks)  # whose tensors the structs point to
        self._structs = (_binary.BlockStruct * len(blocks))(*(b.struct() for b in blocks))

    def __call__(self, x: Tensor) -> Tensor:
        """The blocks after each other.

        Args:
            x: (N, C, H, W), float32, on the CPU; the result has its size and channels_last memory.
                The blocks suit it and the native core (``packed_pointwise.why_not_native``).
        """
        x = x.contiguous(memory_format=torch.channels_last)
        output = torch.empty_like(x)
        times = _times.get()
        seconds = None if times is None else ctypes.c_double()
        status = library().rk_blocks(
            self._structs,
            len(self._structs),
            x.shape[0],
            x.shape[2:].numel(),
            x.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
            seconds,
        )
        check(status)
        if times is not None and seconds is not None:
            times.append(seconds.value)
        return output


def large_kernel_seconds() -> AbstractContextManager[list[float]]:
    """A list to which every call of ``Blocks`` in the ``with`` block adds its large kernels' time.

    Holds in this thread or asynchronous task.
    """
    return collected(_times)

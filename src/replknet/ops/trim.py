"""Kernels larger than the map: leave out the taps that only ever meet padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from replknet.ops.problem import Problem


@dataclass(frozen=True)
class Taps:
    """The taps of a kernel that are kept, as half-open ranges of rows and columns."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, weight: Tensor) -> Tensor:
        """These taps of a weight (C, 1, Kh, Kw), contiguous."""
        if weight.shape[2:] == (self.bottom - self.top, self.right - self.left):
            return weight.contiguous()
        return weight[:, :, self.top : self.bottom, self.left : self.right].contiguous()

    def spread(self, gradient: Tensor, size: Sequence[int]) -> Tensor:
        """Gradient of a weight of that size from the one of these taps: zero at the others."""
        if gradient.shape == size:
            return gradient.contiguous()
        whole = gradient.new_zeros(size)
        whole[:, :, self.top : self.bottom, self.left : self.right] = gradient
        return whole


@lru_cache(maxsize=4096)
def trim(problem: Problem) -> tuple[Problem, Taps]:
    """The smallest problem with the same outputs, and the taps it keeps.

    With "same" padding a 31x31 kernel on a 7x7 map touches the map with its inner 13x13 only.
    """
    top, bottom, left, right = problem.padding
    (kernel_h, kernel_w), (dilation_h, dilation_w) = problem.kernel_size, problem.dilation
    output_h, output_w = problem.output_size
    reach_h = problem.stride[0] * (output_h - 1) + 1
    reach_w = problem.stride[1] * (output_w - 1) + 1
    above, below = _idle(problem.height, kernel_h, dilation_h, top, bottom, reach_h)
    before, after = _idle(problem.width, kernel_w, dilation_w, left, right, reach_w)
    taps = Taps(above, kernel_h - below, before, kernel_w - after)
    trimmed = replace(
        problem,
        kernel_size=(kernel_h - above - below, kernel_w - before - after),
        padding=(
            top - above * dilation_h,
            bottom - below * dilation_h,
            left - before * dilation_w,
            right - after * dilation_w,
        ),
    )
    return trimmed, taps


def _idle(
    size: int, taps: int, dilation: int, pad_low: int, pad_high: int, reach: int
) -> tuple[int, int]:
    """Number of taps at the low and at the high end that meet padding at every output.

    Tap ``k`` at output ``i`` (0 <= i < reach) reads position ``i - pad_low + k * dilation``.
    """
    low = max(0, -(-(pad_low - reach + 1) // dilation))  # taps that end left of position 0
    high = max(0, taps - -(-(size + pad_low) // dilation))  # taps that start right of the map
    low = min(low, pad_low // dilation, taps - 1)
    high = min(high, pad_high // dilation, taps - 1 - low)
    return low, high

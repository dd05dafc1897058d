"""Everything the choice of a convolution algorithm depends on."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Literal

import torch

Pass = Literal["forward", "grad_input", "grad_weight"]
Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True)
class Problem:
    """One pass of one depthwise convolution; sizes are in elements.

    ``padding`` is (top, bottom, left, right), so that even kernels can be padded unevenly.
    """

    pass_: Pass
    batch: int
    channels: int
    height: int
    width: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    layout: Layout
    device: str  # torch.device.type

    @cached_property
    def output_size(self) -> tuple[int, int]:
        """Output height and width."""
        top, bottom, left, right = self.padding
        reach_h = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        reach_w = self.dilation[1] * (self.kernel_size[1] - 1) + 1
        return (
            (self.height + top + bottom - reach_h) // self.stride[0] + 1,
            (self.width + left + right - reach_w) // self.stride[1] + 1,
        )

    @cached_property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H', W')."""
        return self.batch, self.channels, *self.output_size

    @cached_property
    def strides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Strides of input and output in the problem's layout."""
        return self._strides(self.height, self.width), self._strides(*self.output_size)

    def _strides(self, height: int, width: int) -> tuple[int, ...]:
        image = self.channels * height * width
        if self.layout == "NHWC":
            return image, 1, self.channels * width, self.channels
        return image, height * width, width, 1

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Kept, because a problem is looked up several times a call."""
        return hash(astuple(self))

"""Convolutions after each other, of which a large map takes a band of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor, nn

from replknet.deploy.packed import FrozenDepthwiseConv2d, PackedConv2d
from replknet.nn.hooks import has_hooks
from replknet.nn.norm import is_sequential
from replknet.ops.arguments import four_sides, pair

BAND_BYTES = 16 << 20
"""What the largest map between two layers may take at a time; measured."""


@dataclass(frozen=True)
class Window:
    """What one output of a layer reads: rows and columns, and the padding around all of them."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    channels: int | None
    """Of the output; None for those of the input."""

    def output_size(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the output."""
        top, bottom, left, right = self.padding
        rows = (height + top + bottom - self.size[0]) // self.stride[0] + 1
        columns = (width + left + right - self.size[1]) // self.stride[1] + 1
        return self.channels or channels, rows, columns

    def rows_read(self, begin: int, end: int, height: int) -> tuple[int, int]:
        """The rows of a map of ``height`` of which the outputs from ``begin`` to ``end`` are made.

        If the layer is given them alone, its outputs are those from the first row over the stride
        on, and right from ``begin`` on.
        """
        stride, top = self.stride[0], self.padding[0]
        first = max(0, (begin * stride - top) // stride)
        return first * stride, min(height, (end - 1) * stride - top + self.size[0])


def window(layer: nn.Module) -> Window | None:
    """What an output of a convolution or activation reads; None for other layers."""
    if type(layer) is nn.ReLU:
        return Window((1, 1), (1, 1), (0, 0, 0, 0), None)
    if isinstance(layer, PackedConv2d):
        return Window((1, 1), (1, 1), (0, 0, 0, 0), layer.out_channels)
    if isinstance(layer, FrozenDepthwiseConv2d):
        channels = layer.channels
    elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        channels = layer.out_channels
    else:
        return None
    kernel_size = pair("kernel_size", layer.kernel_size, 1)
    stride, dilation = pair("stride", layer.stride, 1), pair("dilation", layer.dilation, 1)
    padding = four_sides(layer.padding, kernel_size, stride, dilation)
    height, width = ((k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True))
    # Outputs that read nothing but padding have no rows.
    return Window((height, width), stride, padding, channels) if max(padding) < height else None


def unit_layers(unit: nn.Module) -> list[nn.Module]:
    """Convolution and activation of a conv-BN-activation unit whose norm is folded away."""
    return [part for part in unit.children() if not isinstance(part, nn.Identity)]


def suit_bands(units: Iterable[nn.Module]) -> bool:
    """Whether these modules run their children in turn, and ``window`` knows all of those."""
    return all(is_sequential(unit) and all(map(window, unit_layers(unit))) for unit in units)


class BandedSequential(nn.Sequential):
    """Units of convolutions and activations, one after the other.

    Large maps go through all of them image by image, very large ones a band of rows at a time: what
    is between two layers is never whole in memory. The few rows that two bands read are computed
    twice. With hooks on one of the layers all maps are whole.
    """

    def __init__(self, *units: nn.Module) -> None:
        """
        Args:
            units: Such as ``suit_bands``.

        Raises:
            ValueError: They do not.
        """
        super().__init__(*units)
        if not suit_bands(units):
            raise ValueError(f"cannot tell what each of these layers reads: {units}")
        self._layers = [layer for unit in units for layer in unit_layers(unit)]
        self._windows = [read for read in map(window, self._layers) if read is not None]

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4:
            return super().forward(input)
        sizes = [tuple(input.shape[1:])]
        for read in self._windows:
            sizes.append(read.output_size(*sizes[-1]))
        batch, (_, height, _) = len(input), sizes[-1]
        largest = input.element_size() * max(map(prod, sizes[1:]))
        bands = 1 if largest <= 2 * BAND_BYTES else min(height, -(-largest // BAND_BYTES))
        whole = batch * largest <= BAND_BYTES or batch * bands == 1
        if whole or any(map(has_hooks, (*self, *self._layers))):
            return super().forward(input)
        output = torch.empty(
            (batch, *sizes[-1]),
            dtype=input.dtype,
            device=input.device,
            memory_format=torch.channels_last,
        )
        heights = [size[1] for size in sizes]
        for n, band in product(range(batch), range(bands)):
            rows = height * band // bands, height * (band + 1) // bands
            output[n : n + 1, :, slice(*rows)] = self._rows(input[n : n + 1], rows, heights)
        return output

    def _rows(self, x: Tensor, rows: tuple[int, int], heights: Sequence[int]) -> Tensor:
        """Some rows of the output; ``heights`` of the input and of what each layer makes."""
        needed = [rows]
        for read, height in zip(reversed(self._windows), reversed(heights[:-1]), strict=True):
            needed.insert(0, read.rows_read(*needed[0], height))
        x, first = x[:, :, slice(*needed[0])], needed[0][0]
        layers = zip(self._layers, self._windows, needed[1:], strict=True)
        for layer, read, (begin, end) in layers:
            made = first // read.stride[0]
            x, first = layer(x)[:, :, begin - made : end - made], begin
        return x

"""Inference layers: packed weights, and bias, activation and residual folded into the product.

They hold buffers, never parameters: nothing of an optimized network is trained. Inside, pixels are
rows of channels, so feature maps are (N, C, H, W) tensors in channels_last memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from replknet.ops import depthwise_conv2d, depthwise_conv2d_relu
from replknet.ops.arguments import four_sides, make_problem, pair
from replknet.ops.choose import requested
from replknet.ops.eager import is_ordinary, traced
from replknet.ops.native import isa, why_missing
from replknet.ops.packed_blocks import LargeKernel, large_kernel
from replknet.ops.packed_pointwise import (
    Activation,
    Layer,
    pack,
    pointwise,
    pointwise_pair,
    why_not_native,
)
from replknet.ops.prepared import Forward, pack_filters, prepare_forward, unpack_filters

_BUFFERS = ("weight", "bias", "input_sizes", "output_sizes", "pair_sums")


class PackedProduct(nn.Module):
    """Weight and bias of one product, laid out for the kernel."""

    weight: Tensor
    bias: Tensor
    input_sizes: Tensor | None
    output_sizes: Tensor | None
    pair_sums: Tensor | None

    def __init__(
        self, matrix: Tensor, bias: Tensor | None, activation: Activation = "identity"
    ) -> None:
        super().__init__()
        layer = pack(matrix, bias, activation)
        for name in _BUFFERS:
            self.register_buffer(name, getattr(layer, name))
        self.out_channels, self.in_channels = matrix.shape
        self.activation: Activation = activation
        self._layer: Layer | None = None

    @property
    def layer(self) -> Layer:
        kept = self._layer
        if kept is None or any(getattr(kept, n) is not self._buffers[n] for n in _BUFFERS):
            kept = self._layer = Layer(
                self.weight,
                self.bias,
                self.out_channels,
                self.activation,
                self.input_sizes,
                self.output_sizes,
                self.pair_sums,
            )
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layer": None}

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, activation={self.activation}"


class PackedConv2d(PackedProduct):
    """``activation(conv1x1(x)) + residual`` on (N, in_channels, H, W) or (in_channels, H, W)."""

    def __init__(self, conv: nn.Conv2d, activation: Activation = "identity") -> None:
        super().__init__(conv.weight.flatten(1), conv.bias, activation)

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """``overwrite`` gives up the residual: its memory may become the result's."""
        if x.dim() == 3:
            return self.forward(x[None], _batch(residual), overwrite)[0]
        return pointwise(x, self.layer, residual, overwrite=overwrite)


class PackedMLP(nn.Module):
    """``second(activation(first(x))) + residual``, two 1x1 convolutions or linear layers.

    Input (N, C, H, W) or (C, H, W) when the layers are convolutions, (..., C) when they are linear.
    """

    def __init__(
        self, first: nn.Conv2d | nn.Linear, second: nn.Conv2d | nn.Linear, activation: Activation
    ) -> None:
        super().__init__()
        self.first = PackedProduct(first.weight.flatten(1), first.bias, activation)
        self.second = PackedProduct(second.weight.flatten(1), second.bias)
        self.on_maps = isinstance(first, nn.Conv2d)

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """``overwrite`` gives up the residual: its memory may become the result's."""
        first, second = self.first.layer, self.second.layer
        if self.on_maps and x.dim() == 3:
            return self.forward(x[None], _batch(residual), overwrite)[0]
        if self.on_maps:
            return pointwise_pair(x, first, second, residual, overwrite=overwrite)
        rows = None if residual is None else _rows(residual)
        out = pointwise_pair(_rows(x), first, second, rows, overwrite=overwrite)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _batch(image: Tensor | None) -> Tensor | None:
    """A batch of one image."""
    return None if image is None else image[None]


def _rows(x: Tensor) -> Tensor:
    """(N, ..., C) as (N, pixels, C), and fewer dimensions as (n, C)."""
    return x.flatten(1, -2) if x.dim() > 2 else x.reshape(-1, x.shape[-1])


class FrozenDepthwiseConv2d(nn.Module):
    """Depthwise convolution with bias and optional ReLU whose filters never change.

    Input (N, C, H, W) or (C, H, W). The filters are packed, as ``pack_filters`` does. What is
    computed from them is kept for the last ``KEPT_SIZES`` sizes of map, and made anew when they do
    change.
    """

    KEPT_SIZES, KEPT_CALLS = 2, 64

    filters: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, relu: bool = False) -> None:
        super().__init__()
        self.register_buffer("filters", pack_filters(conv.weight))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self.channels, self.kernel_size = conv.out_channels, conv.kernel_size
        stride, dilation = pair("stride", conv.stride, 1), pair("dilation", conv.dilation, 1)
        self.stride, self.dilation, self.relu = stride, dilation, relu
        self.padding = four_sides(conv.padding, conv.kernel_size, stride, dilation)
        # With the filters, whose address is another's once they are gone.
        self._prepared: dict[Hashable, tuple[Forward, Tensor]] = {}
        self._computes: dict[Hashable, Callable[[Tensor, Tensor | None], Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        buffers: dict[str, Any] = self._buffers  # faster than attributes
        filters, bias = buffers["filters"], buffers["bias"]
        wants_gradient = torch.is_grad_enabled() and (x.requires_grad or filters.requires_grad)
        hindered = why_missing() or wants_gradient or traced() or filters.is_inference()
        if not hindered and is_ordinary(x):
            # All that else matters, so that a call takes one look-up.
            map = x.shape, x.stride(), x.dtype, x.device
            key = *map, self.relu, torch.get_num_threads(), *self._state(filters)
            compute = self._computes.get(key) or self._remember(key, x, filters)
            if compute is not None:
                return compute(x, bias)
        if x.dim() == 3:
            return self.forward(x[None])[0]
        convolve = depthwise_conv2d_relu if self.relu else depthwise_conv2d
        return convolve(
            x,
            unpack_filters(filters, self.channels),
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )

    def native(self, x: Tensor) -> LargeKernel | None:
        """This module as ``Blocks`` takes it, for maps like ``x``, if it can run natively."""
        filters = self.filters
        if not self._is_native(x, filters):
            return None
        return large_kernel(self._prepare(x, filters), x.shape[0], self.bias, self.relu)

    def _is_native(self, x: Tensor, filters: Tensor) -> bool:
        return (
            x.dim() == 4
            and x.shape[1] == self.channels
            and x.numel() > 0
            and not (why_not_native(x, filters) or filters.is_inference())
        )

    def _state(self, filters: Tensor) -> tuple[Hashable, ...]:
        """What prepared filters depend on, beside the size of the map."""
        return filters.data_ptr(), filters._version, isa(), requested("auto")

    def _remember(
        self, key: Hashable, x: Tensor, filters: Tensor
    ) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """What computes maps like ``x``, if it can run natively."""
        if not self._is_native(x, filters):
            return None
        compute = self._prepare(x, filters).of_batch(x.shape[0], self.relu)
        if not x.is_contiguous(memory_format=torch.channels_last):
            in_place = compute

            def compute(x: Tensor, bias: Tensor | None) -> Tensor:
                return in_place(x.contiguous(memory_format=torch.channels_last), bias)

        if len(self._computes) >= self.KEPT_CALLS:
            self._computes = {}
        self._computes[key] = compute
        return compute

    def _prepare(self, x: Tensor, filters: Tensor) -> Forward:
        key = (x.shape[1:], *self._state(filters))
        found = self._prepared.get(key)
        if found is None:
            problem = make_problem(
                "forward",
                (1, *x.shape[1:]),
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                x.dtype,
                "NHWC",
                x.device.type,
            )
            found = prepare_forward(problem, filters, self.relu), filters
            # New dictionaries: other threads may be reading the old ones.
            kept = list(self._prepared.items())[1 - self.KEPT_SIZES :]
            self._prepared, self._computes = dict([*kept, (key, found)]), {}
        return found[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}, "_computes": {}}

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, relu={self.relu}"

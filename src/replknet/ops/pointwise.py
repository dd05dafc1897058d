"""Products with packed weights for inference: pointwise convolutions and linear layers.

The native kernel keeps its sums in registers, and adds bias, activation and residual on their way
to memory. Where it cannot run (another device or dtype, gradients wanted, no native core), the
same function is made of PyTorch's operators.

Each output is one sum in a fixed order, so the results of an image depend on nothing else in its
batch, and not on the number of threads. Large layers (512 channels to 512, say) are computed in
other ways, also fixed:

- With AMX, every number is split into three of bfloat16, 24 bits together, and the six largest of
  the nine products of parts are added up in float32: as exact as float32 itself (and more so than
  one long sum). An infinity, or a number above 3.38e38, makes a NaN.
- Elsewhere by Strassen's method, an eighth fewer multiply-adds, on maps of an even number of
  pixels: errors are relative to the larger of two neighbouring pixels, and a value that is not
  finite spoils its neighbour's result too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.ops import _binary
from replknet.ops.native import check

Activation = Literal["identity", "relu", "gelu"]
ACTIVATIONS: dict[Activation, int] = {
    "identity": _binary.IDENTITY,
    "relu": _binary.RELU,
    "gelu": _binary.GELU,
}
PANEL, COLUMNS = _binary.PANEL, _binary.COLUMNS


@dataclass(frozen=True)
class Layer:
    """``activation(x @ weight.T + bias)``; ``weight`` and ``bias`` as ``pack`` returns them."""

    weight: Tensor
    bias: Tensor
    out_channels: int
    activation: Activation

    @cached_property
    def weight_size(self) -> float:
        """The root of the mean square of the weights, on which only rounding errors depend."""
        squares = self.weight.detach().square().sum() / (self.in_channels * self.out_channels)
        return squares.sqrt().item()

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1]

    def struct(self) -> _binary.LayerStruct:
        """For one call: whoever shares memory with other processes moves tensors."""
        return _binary.LayerStruct(
            self.weight.data_ptr(),
            self.bias.data_ptr(),
            self.in_channels,
            self.out_channels,
            ACTIVATIONS[self.activation],
            self.weight_size,
        )


def pack(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lay out a weight (out, in) as (panels, in, PANEL), and its bias as (panels * PANEL,).

    Both are filled up with zeros to a multiple of COLUMNS outputs; a missing bias is zero.
    """
    out_channels, in_channels = weight.shape
    missing = -out_channels % COLUMNS
    packed = F.pad(weight.detach(), (0, 0, 0, missing)).reshape(-1, PANEL, in_channels)
    bias = weight.new_zeros(out_channels) if bias is None else bias.detach()
    return packed.transpose(1, 2).contiguous(), F.pad(bias, (0, missing))


def unpack(weight: Tensor, out_channels: int) -> Tensor:
    """The (out, in) weight of a packed one."""
    return weight.transpose(1, 2).flatten(0, 1)[:out_channels]


def why_not_native(x: Tensor, *tensors: Tensor | None) -> str:
    """Why the native kernel cannot compute with these tensors; empty when it can."""
    if _binary.library is None:
        return _binary.reason_missing
    for tensor in (x, *tensors):
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"{type(tensor).__name__} holds no memory to compute on"
        if not tensor.is_cpu:
            return f"the native kernel runs on the CPU, not on {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"the native kernel computes in float32, not {tensor.dtype}"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "the native kernel has no gradient"
    return ""


def pointwise(
    x: Tensor, layer: Layer, residual: Tensor | None = None, *, overwrite: bool = False
) -> Tensor:
    """``activation(x @ weight.T + bias) + residual`` of each pixel.

    Args:
        x: Rows (n, in) or (N, pixels, in), or maps (N, in, H, W) with a result in channels_last
            memory. Which way a large layer is computed depends on the pixels of an image; rows
            (n, in) are images of one.
        layer: Packed weight and bias, and the activation.
        residual: Of the size of the result.
        overwrite: Nobody needs the residual any more: its memory may become the result's.

    Raises:
        ValueError: ``x`` or ``residual`` has another number of channels.
    """
    _check_sizes(x, layer.in_channels, layer.out_channels, residual)
    if why_not_native(x, layer.weight, residual):
        return _plain(x, layer, residual)
    return _run(
        _library().rk_pointwise, (layer.struct(),), x, layer.out_channels, residual, overwrite
    )


def pointwise_pair(
    x: Tensor,
    first: Layer,
    second: Layer,
    residual: Tensor | None = None,
    *,
    overwrite: bool = False,
) -> Tensor:
    """``second(first(x)) + residual`` without a tensor for what lies between the two.

    As ``pointwise``. The residual may be ``x`` itself, also when it may be overwritten.
    """
    _check_sizes(x, first.in_channels, second.out_channels, residual)
    if why_not_native(x, first.weight, second.weight, residual):
        return _plain(_plain(x, first, None), second, residual)
    return _run(
        _library().rk_pointwise_pair,
        (first.struct(), second.struct()),
        x,
        second.out_channels,
        residual,
        overwrite,
    )


def _library() -> ctypes.CDLL:
    return cast(ctypes.CDLL, _binary.library)


def _check_sizes(x: Tensor, inputs: int, outputs: int, residual: Tensor | None) -> None:
    if x.dim() not in (2, 3, 4) or x.shape[_channels_dim(x)] != inputs:
        raise ValueError(
            f"input must be (n, {inputs}), (N, pixels, {inputs}) or (N, {inputs}, H, W), "
            f"got {tuple(x.shape)}"
        )
    if residual is not None and residual.shape != (size := _result_size(x, outputs)):
        raise ValueError(f"residual must be {size}, got {tuple(residual.shape)}")


def _channels_dim(x: Tensor) -> int:
    return 1 if x.dim() == 4 else -1


def _result_size(x: Tensor, outputs: int) -> tuple[int, ...]:
    return (x.shape[0], outputs, *x.shape[2:]) if x.dim() == 4 else (*x.shape[:-1], outputs)


def _run(
    function: Callable[..., int],
    structs: Sequence[_binary.LayerStruct],
    x: Tensor,
    out_channels: int,
    residual: Tensor | None,
    overwrite: bool,
) -> Tensor:
    format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    x = x.contiguous(memory_format=format)
    if residual is not None:
        residual = residual.contiguous(memory_format=format)
    if overwrite and residual is not None:
        output = residual
    else:
        size = _result_size(x, out_channels)
        output = torch.empty(size, dtype=torch.float32, memory_format=format)
    pixels = x.shape[2:].numel() if x.dim() == 4 else x.shape[1:-1].numel()
    status = function(
        *structs,
        x.shape[0],
        pixels,
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        output.data_ptr(),
        torch.get_num_threads(),
    )
    check(status)
    return output


def _plain(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    weight, bias = unpack(layer.weight, layer.out_channels), layer.bias[: layer.out_channels]
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(x, weight[..., None, None], bias) if x.dim() == 4 else F.linear(x, weight, bias)
    if layer.activation == "relu":
        out = out.relu()
    elif layer.activation == "gelu":
        out = F.gelu(out)
    return out if residual is None else out + residual

"""Products with packed weights for inference: pointwise convolutions and linear layers.

The native kernel keeps its sums in registers, and adds bias, activation and residual on their way
to memory. Where it cannot run (another device or dtype, gradients wanted, no native core), the
same function is made of PyTorch's operators. Each output is one sum in a fixed order: results do
not depend on the batch or on the number of threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.ops import _binary

Activation = Literal["identity", "relu", "gelu"]
ACTIVATIONS: dict[Activation, int] = {
    "identity": _binary.IDENTITY,
    "relu": _binary.RELU,
    "gelu": _binary.GELU,
}
PANEL = _binary.PANEL


@dataclass(frozen=True)
class Layer:
    """``activation(x @ weight.T + bias)``; ``weight`` and ``bias`` as ``pack`` returns them."""

    weight: Tensor
    bias: Tensor
    out_channels: int
    activation: Activation

    def struct(self) -> _binary.LayerStruct:
        return _binary.LayerStruct(
            self.weight.data_ptr(),
            self.bias.data_ptr(),
            self.weight.shape[1],
            self.out_channels,
            ACTIVATIONS[self.activation],
        )


def pack(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lay out a weight (out, in) as (panels, in, PANEL), and its bias as (panels * PANEL,).

    The last panel is filled up with zeros; a missing bias is zero.
    """
    out_channels, in_channels = weight.shape
    panels = -(-out_channels // PANEL)
    missing = panels * PANEL - out_channels
    packed = F.pad(weight.detach(), (0, 0, 0, missing)).reshape(panels, PANEL, in_channels)
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
        if tensor.device.type != "cpu":
            return f"the native kernel runs on the CPU, not on {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"the native kernel computes in float32, not {tensor.dtype}"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "the native kernel has no gradient"
    return ""


def pointwise(
    rows: Tensor, layer: Layer, residual: Tensor | None = None, *, overwrite: bool = False
) -> Tensor:
    """``activation(rows @ weight.T + bias) + residual``; rows (n, in), result (n, out).

    ``overwrite`` says that nobody needs the residual any more: its memory may become the result's.
    """
    if why_not_native(rows, layer.weight, residual):
        return _plain(rows, layer, residual)
    rows, residual, output = _prepare(rows, layer.out_channels, residual, overwrite)
    status = _library().rk_pointwise(
        ctypes.byref(layer.struct()), *_arguments(rows, residual, output)
    )
    _check(status)
    return output


def pointwise_pair(
    rows: Tensor,
    first: Layer,
    second: Layer,
    residual: Tensor | None = None,
    *,
    overwrite: bool = False,
) -> Tensor:
    """``second(first(rows)) + residual`` without a tensor for what lies between the two.

    The residual may be the rows themselves, also when it may be overwritten (see ``pointwise``).
    """
    if why_not_native(rows, first.weight, second.weight, residual):
        return _plain(_plain(rows, first, None), second, residual)
    rows, residual, output = _prepare(rows, second.out_channels, residual, overwrite)
    status = _library().rk_pointwise_pair(
        ctypes.byref(first.struct()),
        ctypes.byref(second.struct()),
        *_arguments(rows, residual, output),
    )
    _check(status)
    return output


def _library() -> ctypes.CDLL:
    return cast(ctypes.CDLL, _binary.library)


def _prepare(
    rows: Tensor, out_channels: int, residual: Tensor | None, overwrite: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    residual = None if residual is None else residual.contiguous()
    reused = residual if overwrite else None
    output = rows.new_empty(rows.shape[0], out_channels) if reused is None else reused
    return rows.contiguous(), residual, output


def _arguments(rows: Tensor, residual: Tensor | None, output: Tensor) -> tuple[int | None, ...]:
    return (
        rows.shape[0],
        rows.data_ptr(),
        None if residual is None else residual.data_ptr(),
        output.data_ptr(),
        torch.get_num_threads(),
    )


def _check(status: int) -> None:
    if status:
        raise MemoryError("the native core could not allocate its workspace")


def _plain(rows: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    weight = unpack(layer.weight, layer.out_channels)
    out = F.linear(rows, weight, layer.bias[: layer.out_channels])
    if layer.activation == "relu":
        out = out.relu()
    elif layer.activation == "gelu":
        out = F.gelu(out)
    return out if residual is None else out + residual

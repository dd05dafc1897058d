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
- On AMD's processors with AVX-512 (``zen4``), which add beside their multiply-adds, by pairs of
  channels, from 64 input channels on: as exact as one long sum, since ``pack`` divides weights by
  the sizes of their channels. Such a layer also runs on other instruction sets, but slower than
  one packed there. A value that is not finite spoils its pixel.
- Elsewhere by Strassen's method, an eighth fewer multiply-adds, on maps of an even number of
  pixels: errors are relative to the larger of two neighbouring pixels, and a value that is not
  finite spoils its neighbour's result too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.ops import _binary
from replknet.ops.activation import ACTIVATIONS, Activation
from replknet.ops.eager import traced, transforms_active
from replknet.ops.native import check, library

PANEL, COLUMNS = _binary.PANEL, _binary.COLUMNS


@dataclass(frozen=True)
class Layer:
    """``activation(x @ matrix.T + bias)``, laid out for the native kernel by ``pack``."""

    weight: Tensor
    """(panels, in, PANEL): the matrix, divided by the sizes if there are any."""
    bias: Tensor
    out_channels: int
    activation: Activation
    input_sizes: Tensor | None = None
    """(in,), powers of two."""
    output_sizes: Tensor | None = None
    """(panels * PANEL,), powers of two."""
    pair_sums: Tensor | None = None
    """What products by pairs of channels need of the weight alone, as the native core sums it."""

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1]

    def matrix(self) -> Tensor:
        """The (out, in) weight."""
        matrix = self.weight.transpose(1, 2).flatten(0, 1)[: self.out_channels]
        if self.input_sizes is None or self.output_sizes is None:
            return matrix
        return matrix * self.output_sizes[: self.out_channels, None] * self.input_sizes

    def struct(self) -> _binary.LayerStruct:
        """For one call: whoever shares memory with other processes moves tensors."""
        return _binary.LayerStruct(
            self.weight.data_ptr(),
            self.bias.data_ptr(),
            self.in_channels,
            self.out_channels,
            ACTIVATIONS[self.activation],
            None if self.input_sizes is None else self.input_sizes.data_ptr(),
            None if self.output_sizes is None else self.output_sizes.data_ptr(),
            None if self.pair_sums is None else self.pair_sums.data_ptr(),
        )


def pack(matrix: Tensor, bias: Tensor | None, activation: Activation = "identity") -> Layer:
    """Lay out a weight (out, in) as (panels, in, PANEL), and its bias as (panels * PANEL,).

    Both are filled up with zeros to a multiple of COLUMNS outputs; a missing bias is zero. For an
    instruction set that multiplies by pairs of channels, weights are divided by the sizes of their
    input and output channels.
    """
    matrix = matrix.detach()
    out_channels, in_channels = matrix.shape
    missing = -out_channels % COLUMNS
    packed = F.pad(matrix, (0, 0, 0, missing)).reshape(-1, PANEL, in_channels)
    bias = matrix.new_zeros(out_channels) if bias is None else bias.detach()
    layer = Layer(
        packed.transpose(1, 2).contiguous(), F.pad(bias, (0, missing)), out_channels, activation
    )
    if why_not_native(layer.weight):
        return layer
    size = library().rk_pair_sum_bytes(layer.struct())
    return _with_pair_sums(divide(layer), size) if size else layer


def divide(layer: Layer) -> Layer:
    """The same layer, its weight divided by the sizes of its input and output channels."""
    squares = layer.matrix().square()
    inputs = _power_of_two(squares.mean(0))
    outputs = _power_of_two((squares / inputs.square()).mean(1))
    outputs = F.pad(outputs, (0, -layer.out_channels % COLUMNS), value=1)
    weight = layer.weight / (outputs.view(-1, 1, PANEL) * inputs[:, None])
    return replace(layer, weight=weight, input_sizes=inputs, output_sizes=outputs)


def _with_pair_sums(layer: Layer, size: int) -> Layer:
    sums = torch.empty(size // 4, dtype=torch.float32, device="cpu")
    check(library().rk_sum_pairs(layer.struct(), sums.data_ptr()))
    return replace(layer, pair_sums=sums)


def _power_of_two(mean_square: Tensor) -> Tensor:
    """Next to the root; 1 for channels that have no weights."""
    known = (mean_square > 0) & mean_square.isfinite()
    return torch.where(known, mean_square, 1).log2().div(2).round().clamp(-60, 60).exp2()


def why_not_native(x: Tensor, *tensors: Tensor | None) -> str:
    """Why the native kernel cannot compute with these tensors; empty when it can."""
    if _binary.library is None:
        return _binary.reason_missing
    if traced():
        return "a compiler, tracer, transform or mode is to see operators"
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
        library().rk_pointwise, (layer.struct(),), x, layer.out_channels, residual, overwrite
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
        library().rk_pointwise_pair,
        (first.struct(), second.struct()),
        x,
        second.out_channels,
        residual,
        overwrite,
    )


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
        output = torch.empty(size, dtype=torch.float32, device=x.device, memory_format=format)
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
    weight, bias = layer.matrix(), layer.bias[: layer.out_channels]
    if x.dim() == 4 and not transforms_active():  # vmap does not know memory formats
        x = x.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(x, weight[..., None, None], bias) if x.dim() == 4 else F.linear(x, weight, bias)
    if layer.activation == "relu":
        out = out.relu()
    elif layer.activation == "gelu":
        out = F.gelu(out)
    return out if residual is None else out + residual

"""The 1x1 convolution as a layer."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replknet.ops import conv1x1
from replknet.ops.arguments import layout_of
from replknet.ops.eager import transforms_active
from replknet.ops.matmul import native_pays, suits_native

_ONLY_INPUT = (True, False, False)
HAS_MKL = torch.backends.mkl.is_available()  # a constant, which torch.compile can read
# Measured: products from which on MKL is faster than a convolution, and rows of a weight from which
# on ours are faster than MKL.
_FEWEST_FOR_MKL, _FEWEST_ROWS = 3 * 2**25, 256


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a 1x1 kernel that trains by matrix products where those are faster.

    That is for large products on channels-last maps in float32 on a CPU: all three passes by
    native products (``ops.matmul``), and where these cannot run the weight gradient, in MKL. (The
    other two gain little in MKL, and fragment memory.)
    Otherwise, and without gradients, it is ``nn.Conv2d``. State dict and attributes are always the
    same.

    Input (N, in_channels, H, W) in either memory format, which the output keeps.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _is_trained(input, weight):
            native = _is_native(input, weight)
            if native or (HAS_MKL and prod(_sizes(input, weight)) >= _FEWEST_FOR_MKL):
                output: Tensor = _Pointwise.apply(input, weight, bias, native)
                return output
        return super()._conv_forward(input, weight, bias)


class _Pointwise(torch.autograd.Function):
    """A 1x1 convolution by products of matrices of pixels."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, native: bool) -> Any:
        ctx.save_for_backward(input, weight)
        return (conv1x1.forward if native else F.conv2d)(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        to_input = to_weight = to_bias = None
        native = not torch.is_grad_enabled() and _is_native(input, weight, grad)
        if ctx.needs_input_grad[1]:
            if native and len(weight) >= _FEWEST_ROWS:
                to_weight = conv1x1.grad_weight(grad, input)
            else:
                to_weight = (_pixels(grad).T @ _pixels(input)).reshape(weight.shape)
        if ctx.needs_input_grad[2]:
            to_bias = grad.sum((0, 2, 3))
        if ctx.needs_input_grad[0]:
            if native:
                to_input = conv1x1.grad_input(grad, weight)
            else:
                to_input, _, _ = torch.ops.aten.convolution_backward(
                    grad, input, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, _ONLY_INPUT
                )
        return to_input, to_weight, to_bias, None


def _sizes(input: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Pixels, output channels and input channels."""
    outputs, inputs = weight.shape[:2]
    return input.shape[0] * input.shape[2:].numel(), outputs, inputs


def _is_native(input: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether the passes of this convolution run by our own products."""
    return native_pays(*_sizes(input, weight)) and suits_native(input, weight, *others)


def _pixels(image: Tensor) -> Tensor:
    """(N, C, H, W) as (pixels, C), contiguous; a view of channels-last maps."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1]).contiguous()


def _is_trained(input: Tensor, weight: Tensor) -> bool:
    """Whether gradients are wanted of what products of pixels can compute."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and input.dtype == weight.dtype == torch.float32
        and input.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not transforms_active()
        and input.ndim == 4
        and input.shape[1] == weight.shape[1]
        and layout_of(input) == "NHWC"
    )

"""The 1x1 convolution as a layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from replknet.ops.arguments import layout_of
from replknet.ops.matmul import matmul, native_pays, suits_native

_ONLY_INPUT = (True, False, False)
_FEWEST_ROWS = 256  # of a weight whose gradient is faster than in MKL; measured
HAS_MKL = torch.backends.mkl.is_available()  # a constant, which torch.compile can read


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a 1x1 kernel that trains by matrix products where those are faster.

    That is on channels-last maps in float32 on a CPU: all three passes by products
    of our own where processors offer more than a library uses (``ops.matmul``), and elsewhere the
    weight gradient, in MKL. (The other two gain little in MKL, and fragment memory.) Otherwise, and
    without gradients, it is ``nn.Conv2d``. State dict and attributes are always the same.

    Input (N, in_channels, H, W) in either memory format, which the output keeps.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _trains_by_products(input, weight):
            return super()._conv_forward(input, weight, bias)
        output: Tensor = _Pointwise.apply(input, weight, bias)
        return output


class _Pointwise(torch.autograd.Function):
    """A 1x1 convolution by products of matrices of pixels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _is_native(input, weight):
            return F.conv2d(input, weight, bias)
        output = _image(matmul(_pixels(input), weight.flatten(1).T), input)
        return output if bias is None else output.add_(bias[:, None, None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, _ = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        to_input = to_weight = to_bias = None
        native = not torch.is_grad_enabled() and _is_native(input, weight, grad)
        if ctx.needs_input_grad[1]:
            product = matmul if native and len(weight) >= _FEWEST_ROWS else torch.matmul
            to_weight = product(_pixels(grad).T, _pixels(input)).reshape(weight.shape)
        if ctx.needs_input_grad[2]:
            to_bias = grad.sum((0, 2, 3))
        if ctx.needs_input_grad[0]:
            if native:
                to_input = _image(matmul(_pixels(grad), weight.flatten(1)), input)
            else:
                to_input, _, _ = torch.ops.aten.convolution_backward(
                    grad, input, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, _ONLY_INPUT
                )
        return to_input, to_weight, to_bias


def _is_native(input: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether the passes of this convolution run by our own products."""
    outputs, inputs = weight.shape[:2]
    return suits_native(input, weight, *others) and native_pays(
        input.numel() // max(inputs, 1), outputs, inputs
    )


def _pixels(image: Tensor) -> Tensor:
    """(N, C, H, W) as (pixels, C), contiguous; a view of channels-last maps."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1]).contiguous()


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    """(pixels, C) as channels-last maps of the size of ``like``."""
    return pixels.unflatten(0, (like.shape[0], *like.shape[2:])).permute(0, 3, 1, 2)


def _trains_by_products(input: Tensor, weight: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and input.dtype == weight.dtype == torch.float32
        and input.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and input.ndim == 4
        and layout_of(input) == "NHWC"
        and HAS_MKL
    )

"""The 1x1 convolution as a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replknet.ops.arguments import layout_of

HAS_MKL = torch.backends.mkl.is_available()  # a constant, which torch.compile can read


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a 1x1 kernel, trained as matrix products where those are faster.

    That is where MKL computes them, on channels-last maps in float32 on a CPU: its weight gradients
    take two thirds of oneDNN's time for RepLKNet-31B. Elsewhere, and without gradients, it is
    ``nn.Conv2d``. State dict and attributes are always the same.

    Input (N, in_channels, H, W) in either memory format, which the output keeps.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _trains_on_mkl(input, weight):
            return super()._conv_forward(input, weight, bias)
        rows = input.permute(0, 2, 3, 1)
        return F.linear(rows, weight.flatten(1), bias).permute(0, 3, 1, 2)


def _trains_on_mkl(input: Tensor, weight: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and input.dtype == weight.dtype == torch.float32
        and input.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and input.ndim == 4
        and layout_of(input) == "NHWC"
        and HAS_MKL
    )

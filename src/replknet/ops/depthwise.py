"""The depthwise convolution as a function."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = "same",
    dilation: int | tuple[int, int] = 1,
    algorithm: str = "auto",
) -> Tensor:
    """Convolve each channel of ``input`` (N, C, H, W) with its own ``weight`` (C, 1, Kh, Kw)."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups=weight.shape[0])

"""The depthwise convolution as a layer."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replknet.ops import depthwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with one filter a channel, computed by ``replknet.ops.depthwise_conv2d``.

    Constructor, attributes and state dict are those of ``nn.Conv2d``. ``groups`` may be left out,
    since it can only be ``in_channels``.

    Input (N, C, H, W) or (C, H, W), in either memory format, which the output keeps.

    Raises:
        ValueError: ``out_channels`` or ``groups`` differ from ``in_channels``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        groups = in_channels if groups is None else groups
        if not in_channels == out_channels == groups:
            raise ValueError(
                "a depthwise convolution has in_channels == out_channels == groups, got "
                f"{in_channels}, {out_channels} and {groups}; use nn.Conv2d for others"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        stride: Any = self.stride
        dilation: Any = self.dilation
        return convolve(input, weight, bias, stride, padding, dilation)


@torch.fx.wrap  # a tracer of torch.fx keeps the call, as it keeps an nn.Conv2d
def convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """``depthwise_conv2d`` of one map (C, H, W) or several (N, C, H, W)."""
    if input.ndim == 3:
        return convolve(input.unsqueeze(0), weight, bias, stride, padding, dilation).squeeze(0)
    return depthwise_conv2d(input, weight, bias, stride=stride, padding=padding, dilation=dilation)

"""The depthwise convolution as a layer."""

from __future__ import annotations

from torch import Tensor, nn

from replknet.ops import depthwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with ``groups == in_channels == out_channels``, on ``depthwise_conv2d``.

    Constructor, attributes and state dict are those of ``nn.Conv2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return depthwise_conv2d(
            input,
            self.weight,
            self.bias,
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
        )

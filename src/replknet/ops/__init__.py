"""Depthwise convolution with large kernels."""

from replknet.ops.depthwise import depthwise_conv2d

__all__ = ["depthwise_conv2d"]

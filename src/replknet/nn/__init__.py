"""Layers on the operator."""

from replknet.nn.depthwise import DepthwiseConv2d
from replknet.nn.reparam import ReparamLargeKernelConv

__all__ = ["DepthwiseConv2d", "ReparamLargeKernelConv"]

"""Layers on the operator."""

from replknet.nn.depthwise import DepthwiseConv2d

__all__ = ["DepthwiseConv2d"]

"""Layers on the operator."""

from replknet.nn.accelerate import AccelerationReport, accelerate, acceleration_report
from replknet.nn.depthwise import DepthwiseConv2d
from replknet.nn.pointwise import PointwiseConv2d
from replknet.nn.reparam import ReparamLargeKernelConv

__all__ = [
    "AccelerationReport",
    "DepthwiseConv2d",
    "PointwiseConv2d",
    "ReparamLargeKernelConv",
    "accelerate",
    "acceleration_report",
]

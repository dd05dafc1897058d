"""Depthwise convolution with large kernels: one function, several algorithms."""

from replknet.ops import _binary
from replknet.ops.algorithm import register
from replknet.ops.arguments import problem_of
from replknet.ops.choose import Explanation, explain, use
from replknet.ops.depthwise import decompositions, depthwise_conv2d, depthwise_conv2d_relu
from replknet.ops.native import NativeAlgorithm
from replknet.ops.problem import Problem
from replknet.ops.torch_conv import TorchConv
from replknet.ops.torch_fft import TorchFFT
from replknet.ops.triton_conv import TritonConv

__all__ = [
    "Explanation",
    "Problem",
    "decompositions",
    "depthwise_conv2d",
    "depthwise_conv2d_relu",
    "explain",
    "problem_of",
    "use",
]

register(NativeAlgorithm("direct", _binary.DIRECT))
register(NativeAlgorithm("fft", _binary.FFT))
register(TritonConv())
register(TorchFFT())
register(TorchConv())

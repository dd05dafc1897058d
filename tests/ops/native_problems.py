"""What the tests of both native algorithms share."""

import pytest
import torch

from replknet.ops import native
from replknet.ops.problem import Problem

each_isa = pytest.mark.parametrize("isa", native.isas())


def native_problem(pass_, input, weight, padding, stride=(1, 1), dilation=(1, 1)):
    batch, channels, height, width = input.shape
    layout = "NHWC" if input.is_contiguous(memory_format=torch.channels_last) else "NCHW"
    kernel_size = tuple(weight.shape[2:])
    return Problem(
        pass_, batch, channels, height, width,
        kernel_size, stride, padding, dilation, input.dtype, layout, "cpu",
    )  # fmt: skip

"""Algorithm "torch": PyTorch's own convolution, always possible."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.ops import cuda_choice
from replknet.ops.algorithm import Support
from replknet.ops.arguments import memory_format
from replknet.ops.cost import predict
from replknet.ops.problem import Layout, Problem

CONVERSION_SECONDS = 4e-10  # for each element whose memory format changes


class TorchConv:
    """``F.conv2d`` and its backward, in whichever memory format is predicted to be faster.

    PyTorch's kernels for the two formats differ by up to a factor of 20, so that converting the
    tensor first often pays; the result always has the format of the problem.
    """

    name = "torch"
    folds_relu = False

    def __init__(self, layout: Layout | None = None) -> None:
        """Compute always in ``layout``, or as predicted."""
        self.layout = layout

    def supports(self, problem: Problem) -> Support:
        return Support(True)

    def cost(self, problem: Problem) -> float:
        return _cost(problem, self._layout(problem))

    def forward(
        self, problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
    ) -> Tensor:
        input, padding = _pad(problem, input.contiguous(memory_format=self._format(problem)))
        output = F.conv2d(
            input, weight, bias, problem.stride, padding, problem.dilation, problem.channels
        )
        return output.relu_() if relu else output

    def grad_input(self, problem: Problem, grad_output: Tensor, weight: Tensor) -> Tensor:
        if problem.device == "cpu" and weight.dtype in (torch.float16, torch.bfloat16):
            # PyTorch adds these up in 16 bits, which costs 3e-3 to 2e-2 of the largest value.
            single = replace(problem, dtype=torch.float32)
            gradient = self.grad_input(single, grad_output.float(), weight.float())
            return gradient.to(weight.dtype)
        # Only the sizes and the format of this input are read.
        input = torch.empty(
            (problem.batch, problem.channels, problem.height, problem.width),
            dtype=weight.dtype,
            device=weight.device,
            memory_format=self._format(problem),
        )
        grad_output = grad_output.contiguous(memory_format=self._format(problem))
        gradient = _backward(problem, grad_output, input, weight, 0)
        top, bottom, left, right = problem.padding
        if top == bottom and left == right:
            return gradient
        return gradient[..., top : top + problem.height, left : left + problem.width]

    def grad_weight(self, problem: Problem, grad_output: Tensor, input: Tensor) -> Tensor:
        weight = input.new_empty(problem.channels, 1, *problem.kernel_size)
        input = input.contiguous(memory_format=self._format(problem))
        grad_output = grad_output.contiguous(memory_format=self._format(problem))
        return _backward(problem, grad_output, input, weight, 1)

    def _format(self, problem: Problem) -> torch.memory_format:
        return memory_format(self._layout(problem))

    def _layout(self, problem: Problem) -> Layout:
        """The memory format to compute in."""
        return self.layout or best_layout(problem)


def _backward(
    problem: Problem, grad_output: Tensor, input: Tensor, weight: Tensor, which: int
) -> Tensor:
    """Gradient of the input (``which`` = 0) or of the weight (1)."""
    padded, padding = _pad(problem, input)
    return torch.ops.aten.convolution_backward(
        grad_output,
        padded,
        weight,
        None,
        problem.stride,
        padding,
        problem.dilation,
        False,
        (0, 0),
        problem.channels,
        (which == 0, which == 1, False),
    )[which]


def _pad(problem: Problem, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Input and symmetric padding; an uneven padding is applied to the input."""
    top, bottom, left, right = problem.padding
    if top == bottom and left == right:
        return input, (top, left)
    return F.pad(input, (left, right, top, bottom)), (0, 0)


@lru_cache(maxsize=4096)
def best_layout(problem: Problem) -> Layout:
    """The memory format in which PyTorch computes a problem faster, conversions included."""
    if problem.device == "cuda":
        return cuda_choice.pytorch_layout(problem)
    if problem.device != "cpu":
        return problem.layout
    layouts: tuple[Layout, Layout] = ("NCHW", "NHWC")
    return min(layouts, key=lambda layout: _cost(problem, layout))


def _cost(problem: Problem, layout: Layout) -> float:
    """Predicted seconds when computed in ``layout``, conversions included."""
    output_h, output_w = problem.output_size
    map_size = sqrt(output_h * output_w)
    if problem.dtype == torch.float64:
        # No oneDNN kernel has float64: every pass is of the kind of float32's weight gradient,
        # and NHWC is slower still.
        slowest = replace(problem, pass_="grad_weight")
        seconds = predict("torch", slowest, "NCHW", map_size)
        return 2 * seconds if layout == "NCHW" else 8 * seconds
    seconds = predict("torch", problem, layout, map_size)
    if layout == problem.layout:
        return seconds
    pixels = problem.height * problem.width + output_h * output_w
    return seconds + CONVERSION_SECONDS * problem.batch * problem.channels * pixels

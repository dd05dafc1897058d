"""Run one pass on real tensors: trim the kernel, choose an algorithm, compute."""

from __future__ import annotations

import torch
from torch import Tensor

from replknet.ops.algorithm import Convolve, Gradient
from replknet.ops.arguments import memory_format
from replknet.ops.choose import choose
from replknet.ops.native import NativeAlgorithm
from replknet.ops.problem import Problem
from replknet.ops.trim import trim


def forward(
    problem: Problem,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    algorithm: str,
) -> Tensor:
    """Output (N, C, H', W') in the layout of the problem."""
    format = memory_format(problem.layout)
    if input.numel() == 0:
        output = input.new_zeros(problem.output_shape).contiguous(memory_format=format)
        if bias is not None:
            output += bias[:, None, None]
        return output.relu_() if relu else output
    problem, taps = trim(problem)
    weight = taps.of(weight)
    if bias is not None:
        bias = bias.contiguous()
    input = input.contiguous(memory_format=format)
    output = choose(problem, algorithm, relu).forward(problem, input, weight, bias, relu)
    return output.contiguous(memory_format=format)


def grad_input(problem: Problem, grad_output: Tensor, weight: Tensor, algorithm: str) -> Tensor:
    """Gradient (N, C, H, W) of the input in the layout of the problem."""
    format = memory_format(problem.layout)
    if grad_output.numel() == 0 or problem.height * problem.width == 0:
        size = (problem.batch, problem.channels, problem.height, problem.width)
        return grad_output.new_zeros(size).contiguous(memory_format=format)
    problem, taps = trim(problem)
    weight = taps.of(weight)
    grad_output = grad_output.contiguous(memory_format=format)
    gradient = choose(problem, algorithm).grad_input(problem, grad_output, weight)
    return gradient.contiguous(memory_format=format)


def grad_weight(problem: Problem, grad_output: Tensor, input: Tensor, algorithm: str) -> Tensor:
    """Gradient (C, 1, Kh, Kw) of the weight; zero at the taps that never meet the map."""
    size = (problem.channels, 1, *problem.kernel_size)
    if grad_output.numel() == 0 or input.numel() == 0:
        return input.new_zeros(size)
    format = memory_format(problem.layout)
    problem, taps = trim(problem)
    input = input.contiguous(memory_format=format)
    grad_output = grad_output.contiguous(memory_format=format)
    return taps.spread(choose(problem, algorithm).grad_weight(problem, grad_output, input), size)


# The same for tensors to come, with the current number of threads. ``in_place``: all of them will
# be contiguous, those of maps with the strides of the problem.


def forward_of(problem: Problem, relu: bool, algorithm: str, in_place: bool) -> Convolve:
    """Computes what ``forward`` does."""
    if in_place and (native := _native(problem, algorithm, relu)):
        return native.forward_of(problem, relu)
    return lambda input, weight, bias: forward(problem, input, weight, bias, relu, algorithm)


def grad_input_of(problem: Problem, algorithm: str, in_place: bool) -> Gradient:
    """Computes what ``grad_input`` does."""
    if in_place and (native := _native(problem, algorithm)):
        return native.grad_input_of(problem)
    return lambda grad_output, weight: grad_input(problem, grad_output, weight, algorithm)


def grad_weight_of(problem: Problem, algorithm: str, in_place: bool) -> Gradient:
    """Computes what ``grad_weight`` does."""
    if in_place and (native := _native(problem, algorithm)):
        return native.grad_weight_of(problem)
    return lambda grad_output, input: grad_weight(problem, grad_output, input, algorithm)


def _native(problem: Problem, algorithm: str, relu: bool = False) -> NativeAlgorithm | None:
    """The algorithm for ``problem`` if it computes just that, without a copy of a tensor."""
    empty = 0 in (problem.batch, problem.channels, problem.height, problem.width)
    if empty or problem.dtype != torch.float32 or trim(problem)[0] != problem:
        return None
    chosen = choose(problem, algorithm, relu)
    return chosen if isinstance(chosen, NativeAlgorithm) else None

"""The three passes of a 1x1 convolution as products of our own, for training on a CPU.

For channels-last maps and weights that ``matmul.suits_native``. The functions have no derivatives;
whoever watches PyTorch's operators sees ``replknet::conv1x1`` and its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from replknet.ops.eager import nothing_listens
from replknet.ops.matmul import Matrix, multiply


def run_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Output (N, out, H, W) of an input (N, in, H, W) and a weight (out, in, 1, 1)."""
    input, weight = _channels_last(input), weight.contiguous()
    output = _maps(input, len(weight))
    multiply(_pixels(input), _matrix(weight).T, output)
    return output if bias is None else output.add_(bias[:, None, None])


def run_grad_input(grad_output: Tensor, weight: Tensor) -> Tensor:
    """Gradient (N, in, H, W) of the input."""
    grad_output, weight = _channels_last(grad_output), weight.contiguous()
    grad_input = _maps(grad_output, weight.shape[1])
    multiply(_pixels(grad_output), _matrix(weight), grad_input)
    return grad_input


def run_grad_weight(grad_output: Tensor, input: Tensor) -> Tensor:
    """Gradient (out, in, 1, 1) of the weight."""
    grad_output, input = _channels_last(grad_output), _channels_last(input)
    grad_weight = input.new_empty(grad_output.shape[1], input.shape[1], 1, 1)
    multiply(_pixels(grad_output).T, _pixels(input), grad_weight)
    return grad_weight


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _maps(like: Tensor, channels: int) -> Tensor:
    size = (len(like), channels, *like.shape[2:])
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _pixels(maps: Tensor) -> Matrix:
    channels = maps.shape[1]
    return Matrix(maps.data_ptr(), maps.numel() // channels, channels)


def _matrix(weight: Tensor) -> Matrix:
    return Matrix(weight.data_ptr(), *weight.shape[:2])


def _visible(run: Callable[..., Tensor], operator: Any) -> Callable[..., Tensor]:
    """``run``, as an operator where somebody is to see it."""

    def call(*tensors: Tensor | None) -> Tensor:
        result: Tensor = (run if nothing_listens() else operator)(*tensors)
        return result

    return call


_operator: Any = partial(torch.library.custom_op, mutates_args=())
forward_operator = _operator("replknet::conv1x1", run_forward)
grad_input_operator = _operator("replknet::conv1x1_grad_input", run_grad_input)
grad_weight_operator = _operator("replknet::conv1x1_grad_weight", run_grad_weight)
forward = _visible(run_forward, forward_operator)
grad_input = _visible(run_grad_input, grad_input_operator)
grad_weight = _visible(run_grad_weight, grad_weight_operator)


@forward_operator.register_fake
def _(input, weight, bias):
    return _maps(input, len(weight))


@grad_input_operator.register_fake
def _(grad_output, weight):
    return _maps(grad_output, weight.shape[1])


@grad_weight_operator.register_fake
def _(grad_output, input):
    return input.new_empty(grad_output.shape[1], input.shape[1], 1, 1)


@register_flop_formula(torch.ops.replknet.conv1x1)
def _(input, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(input) * weight[0]


@register_flop_formula(torch.ops.replknet.conv1x1_grad_input)
def _(grad_output, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(grad_output) * weight[1]


@register_flop_formula(torch.ops.replknet.conv1x1_grad_weight)
def _(grad_output, input, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(grad_output) * input[1]

"""Batch norm of a training step and the activation behind it, in one pass over memory each way.

The operator ``replknet::batch_norm`` and its gradient are native, for float32 channels-last maps on
a CPU. Unlike PyTorch's two modules they keep one tensor for the backward pass, the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from replknet.ops import _binary
from replknet.ops.activation import ACTIVATIONS, Activation
from replknet.ops.arguments import layout_of
from replknet.ops.eager import is_ordinary, nothing_listens


def suits_native(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether ``batch_norm`` can normalize these tensors."""
    return (
        _binary.library is not None
        and not torch.compiler.is_compiling()
        and all(map(is_ordinary, (input, weight, bias)))
        and input.is_cpu
        and all(t is None or t.dtype == torch.float32 for t in (input, weight, bias))
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and input.ndim == 4
        and input.numel() > input.shape[1]
        and layout_of(input) == "NHWC"
    )


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation = "identity",
) -> tuple[Tensor, Tensor, Tensor]:
    """``activation(batch norm of input)``, and the mean and biased variance of each channel.

    Input and output (N, C, H, W), weight and bias (C,); for tensors that ``suits_native``. No
    gradient flows through the mean and the variance.
    """
    if nothing_listens():
        output, mean, variance = BatchNorm.apply(input, weight, bias, eps, activation)
    else:
        output, mean, variance = forward(input, weight, bias, eps, activation)
    return output, mean, variance


def run_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``batch_norm`` returns."""
    input = input.contiguous(memory_format=torch.channels_last)
    output = torch.empty_like(input)
    mean, variance = input.new_empty(input.shape[1]), input.new_empty(input.shape[1])
    weight, bias = _contiguous(weight), _contiguous(bias)
    norm = _struct((weight, bias, mean, variance), eps)
    _run("rk_norm_forward", norm, activation, input, output)
    return output, mean, variance


def run_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input (N, C, H, W), the weight and the bias (C,)."""
    input = input.contiguous(memory_format=torch.channels_last)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    grad_input, grad_weight = torch.empty_like(input), torch.empty_like(mean)
    grad_bias = torch.empty_like(mean)
    weight, bias = _contiguous(weight), _contiguous(bias)
    norm = _struct((weight, bias, mean, variance), eps, (grad_weight, grad_bias))
    _run("rk_norm_backward", norm, activation, input, grad_output, grad_input)
    return grad_input, grad_weight, grad_bias


def _struct(
    values: Sequence[Tensor | None], eps: float, grads: Sequence[Tensor | None] = (None, None)
) -> _binary.NormStruct:
    """A batch norm whose running statistics stay: weight, bias, mean, variance; gradients."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in (*values, *grads)]
    return _binary.NormStruct(*addresses[:4], None, None, None, *addresses[4:], eps)


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _run(
    name: str, norm: _binary.NormStruct, activation: str, input: Tensor, *rest: Tensor
) -> None:
    channels = input.shape[1]
    maps = (tensor.data_ptr() for tensor in (input, *rest))
    code = ACTIVATIONS[cast("Activation", activation)]
    rows = input.numel() // channels
    run = getattr(_binary.library, name)
    if run(norm, rows, channels, code, *maps, torch.get_num_threads()):
        raise MemoryError("not enough memory for the sums of a batch norm")


_operator: Any = partial(torch.library.custom_op, mutates_args=())
forward = _operator("replknet::batch_norm", run_forward)
backward = _operator("replknet::batch_norm_backward", run_backward)


@forward.register_fake
def _(input, weight, bias, eps, activation):
    channels = input.shape[1]
    return torch.empty_like(input), input.new_empty(channels), input.new_empty(channels)


@backward.register_fake
def _(grad_output, input, mean, variance, weight, bias, eps, activation):
    return torch.empty_like(input), torch.empty_like(mean), torch.empty_like(mean)


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, bias, ctx.eps, ctx.activation = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(input, weight, bias, mean, variance)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    input, weight, bias, mean, variance = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradient is to be differentiated again
        return _by_pytorch(ctx, grad, input, weight, bias)
    run = run_backward if nothing_listens() and is_ordinary(grad) else backward
    to_input, to_weight, to_bias = run(
        grad, input, mean, variance, weight, bias, ctx.eps, ctx.activation
    )
    return (
        to_input,
        None if weight is None else to_weight,
        None if bias is None else to_bias,
        None,
        None,
    )


def _by_pytorch(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple:
    """The gradients with a graph of their own."""
    output = F.batch_norm(input, None, None, weight, bias, training=True, eps=ctx.eps)
    output = {"identity": lambda x: x, "relu": F.relu, "gelu": F.gelu}[ctx.activation](output)
    wanted = [t for t in (input, weight, bias) if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    of = [next(grads) if t is not None and t.requires_grad else None for t in (input, weight, bias)]
    return *of, None, None


forward.register_autograd(_backward, setup_context=_context)


class BatchNorm(torch.autograd.Function):
    """``forward`` with the same derivative, where nothing is to see an operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = run_forward(*inputs)
        _context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        return _backward(ctx, *grads)

"""The three passes as PyTorch operators ``replknet::depthwise_conv2d*``.

``forward(x, w)`` is bilinear, and so are the gradients ``grad_input(g, w)`` and
``grad_weight(g, x)``. The derivative of each of the three is made of the other two, which gives
derivatives of every order. Arguments are in their full form: ``stride`` and ``dilation`` are
(vertical, horizontal), ``padding`` is (top, bottom, left, right).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from replknet.ops import passes
from replknet.ops.algorithm import Gradient
from replknet.ops.arguments import (
    is_contiguous_weight,
    layout_by,
    layout_of,
    make_problem,
    memory_format,
)
from replknet.ops.choose import requested
from replknet.ops.eager import is_ordinary, nothing_listens
from replknet.ops.problem import Layout


def run_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    algorithm: str,
) -> Tensor:
    """Output (N, C, H', W') in the memory format of ``input``."""
    problem = _problem(
        "forward",
        input.shape,
        weight.shape[2:],
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        input.dtype,
        layout_of(input),
        input.device.type,
    )
    return passes.forward(problem, input, weight, bias, relu, algorithm)


def run_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    algorithm: str,
) -> Tensor:
    """Gradient of the input, whose height and width are ``input_size``."""
    compute = _grad_input(
        grad_output.device,
        grad_output.shape,
        grad_output.stride(),
        grad_output.dtype,
        weight.shape,
        weight.stride(),
        weight.dtype,
        tuple(input_size),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        channels_last,
        algorithm,
        requested(algorithm),
        torch.get_num_threads(),
    )
    return compute(grad_output, weight)


@lru_cache(maxsize=4096)
def _grad_input(
    device: torch.device,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    weight_shape: Sequence[int],
    weight_strides: Sequence[int],
    weight_dtype: torch.dtype,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    algorithm: str,
    request: str,
    threads: int,
) -> Gradient:
    """What computes such gradients; everything that it may depend on is an argument."""
    _check_dtypes(dtype, "weight", weight_dtype)
    problem = make_problem(
        "grad_input",
        (*shape[:2], *input_size),
        weight_shape[2:],
        stride,
        padding,
        dilation,
        dtype,
        "NHWC" if channels_last else "NCHW",
        device.type,
    )
    contiguous = is_contiguous_weight(weight_shape, weight_strides)
    in_place = contiguous and strides == problem.strides[1]
    return passes.grad_input_of(problem, algorithm, in_place)


def run_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    algorithm: str,
) -> Tensor:
    """Gradient (C, 1, Kh, Kw) of the weight."""
    compute = _grad_weight(
        input.device,
        input.shape,
        input.stride(),
        input.dtype,
        grad_output.stride(),
        grad_output.dtype,
        tuple(kernel_size),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        algorithm,
        requested(algorithm),
        torch.get_num_threads(),
    )
    return compute(grad_output, input)


@lru_cache(maxsize=4096)
def _grad_weight(
    device: torch.device,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    grad_output_strides: Sequence[int],
    grad_output_dtype: torch.dtype,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    algorithm: str,
    request: str,
    threads: int,
) -> Gradient:
    """What computes such gradients; everything that it may depend on is an argument."""
    _check_dtypes(grad_output_dtype, "input", dtype)
    layout = layout_by(shape, strides)
    problem = make_problem(
        "grad_weight", shape, kernel_size, stride, padding, dilation, dtype, layout, device.type
    )
    in_place = (strides, grad_output_strides) == problem.strides
    return passes.grad_weight_of(problem, algorithm, in_place)


def _check_dtypes(grad_output: torch.dtype, name: str, other: torch.dtype) -> None:
    if grad_output != other:
        raise ValueError(f"grad_output is {grad_output} but {name} is {other}; use one dtype")


# A call costs a few microseconds less with a problem that is at hand.
_problem = lru_cache(maxsize=4096)(make_problem)

_operator: Any = partial(torch.library.custom_op, mutates_args=())
forward = _operator("replknet::depthwise_conv2d", run_forward)
grad_input = _operator("replknet::depthwise_conv2d_grad_input", run_grad_input)
grad_weight = _operator("replknet::depthwise_conv2d_grad_weight", run_grad_weight)


# Shapes, for fake tensors and the meta device. Sizes may be symbolic: nothing here is cached.


@forward.register_fake
def _(input, weight, bias, stride, padding, dilation, relu, algorithm):
    layout, device = layout_of(input), input.device.type
    problem = make_problem(
        "forward",
        input.shape,
        weight.shape[2:],
        stride,
        padding,
        dilation,
        input.dtype,
        layout,
        device,
    )
    size = (*input.shape[:2], *problem.output_size)
    return _empty(input, size, layout)


@grad_input.register_fake
def _(grad_output, weight, input_size, stride, padding, dilation, channels_last, algorithm):
    size = (*grad_output.shape[:2], *input_size)
    return _empty(grad_output, size, "NHWC" if channels_last else "NCHW")


@grad_weight.register_fake
def _(grad_output, input, kernel_size, stride, padding, dilation, algorithm):
    return input.new_empty(input.shape[1], 1, *kernel_size)


def _empty(like: Tensor, size: Sequence[int], layout: Layout) -> Tensor:
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=memory_format(layout)
    )


# Derivatives. A context keeps only the tensors that a wanted gradient needs.


def _of_backward(algorithm: str, tensor: Tensor) -> str:
    """What to ask for in the backward pass: what is asked for now, if that will not be known."""
    return requested(algorithm) if leaves_thread(tensor) else algorithm


def leaves_thread(tensor: Tensor) -> bool:
    """Whether PyTorch runs the backward pass in another thread, which knows no ``use``."""
    return tensor.is_cuda and is_ordinary(tensor)  # a traced graph asks again when it runs


def _forward_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, weight, _, *ctx.geometry, relu, algorithm = inputs
    ctx.algorithm = _of_backward(algorithm, input)
    ctx.channels_last = layout_of(input) == "NHWC"
    ctx.input_size, ctx.kernel_size = input.shape[2:], weight.shape[2:]
    ctx.save_for_backward(
        input if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        output if relu else None,
    )


def _forward_backward(ctx: Any, grad: Tensor) -> tuple:
    input, weight, output = ctx.saved_tensors
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    # Nobody is to see or to differentiate the gradients: spare the calls of operators.
    bare = not torch.is_grad_enabled() and nothing_listens() and is_ordinary(grad)
    to_input: Callable[..., Tensor] = run_grad_input if bare else grad_input
    to_weight: Callable[..., Tensor] = run_grad_weight if bare else grad_weight
    grads: list[Tensor | None] = [None] * 8
    if ctx.needs_input_grad[0]:
        grads[0] = to_input(
            grad, weight, ctx.input_size, *ctx.geometry, ctx.channels_last, ctx.algorithm
        )
    if ctx.needs_input_grad[1]:
        grads[1] = to_weight(grad, input, ctx.kernel_size, *ctx.geometry, ctx.algorithm)
    if ctx.needs_input_grad[2]:
        grads[2] = grad.sum((0, 2, 3))
    return tuple(grads)


def _grad_input_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad_output, weight, _, *ctx.geometry, _, algorithm = inputs
    ctx.algorithm = _of_backward(algorithm, grad_output)
    ctx.kernel_size = weight.shape[2:]
    ctx.save_for_backward(
        grad_output if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
    )


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple:
    grad_output, weight = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 8
    if ctx.needs_input_grad[0]:
        grads[0] = forward(grad, weight, None, *ctx.geometry, False, ctx.algorithm)
    if ctx.needs_input_grad[1]:
        grads[1] = grad_weight(grad_output, grad, ctx.kernel_size, *ctx.geometry, ctx.algorithm)
    return tuple(grads)


def _grad_weight_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad_output, input, _, *ctx.geometry, algorithm = inputs
    ctx.algorithm = _of_backward(algorithm, grad_output)
    ctx.channels_last = layout_of(input) == "NHWC"
    ctx.input_size = input.shape[2:]
    ctx.save_for_backward(
        grad_output if ctx.needs_input_grad[1] else None,
        input if ctx.needs_input_grad[0] else None,
    )


def _grad_weight_backward(ctx: Any, grad: Tensor) -> tuple:
    grad_output, input = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 7
    if ctx.needs_input_grad[0]:
        grads[0] = forward(input, grad, None, *ctx.geometry, False, ctx.algorithm)
    if ctx.needs_input_grad[1]:
        grads[1] = grad_input(
            grad_output, grad, ctx.input_size, *ctx.geometry, ctx.channels_last, ctx.algorithm
        )
    return tuple(grads)


forward.register_autograd(_forward_backward, setup_context=_forward_context)
grad_input.register_autograd(_grad_input_backward, setup_context=_grad_input_context)
grad_weight.register_autograd(_grad_weight_backward, setup_context=_grad_weight_context)


class DepthwiseConvolution(torch.autograd.Function):
    """``forward`` with the same derivatives, for tensors and modes that need no operator.

    Its last argument computes the output.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, convolve = inputs
        output: Tensor = convolve(*operands[:3])
        _forward_context(ctx, tuple(operands), output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return *_forward_backward(ctx, grad), None


# vmap. A mapped dimension joins the batch where it can, else the channels: each channel has its
# own filter already.


@forward.register_vmap
def _(info, in_dims, input, weight, bias, *rest):
    if in_dims[1] is None and in_dims[2] is None:
        return _over_batch(info, forward, in_dims[0], input, weight, bias, *rest)
    output = forward(
        _into_channels(info, input, in_dims[0], 1),
        _into_channels(info, weight, in_dims[1], 0),
        None if bias is None else _into_channels(info, bias, in_dims[2], 0),
        *rest,
    )
    return output.unflatten(1, (info.batch_size, -1)), 1


@grad_input.register_vmap
def _(info, in_dims, grad_output, weight, *rest):
    if in_dims[1] is None:
        return _over_batch(info, grad_input, in_dims[0], grad_output, weight, *rest)
    gradient = grad_input(
        _into_channels(info, grad_output, in_dims[0], 1),
        _into_channels(info, weight, in_dims[1], 0),
        *rest,
    )
    return gradient.unflatten(1, (info.batch_size, -1)), 1


@grad_weight.register_vmap
def _(info, in_dims, grad_output, input, *rest):
    gradient = grad_weight(
        _into_channels(info, grad_output, in_dims[0], 1),
        _into_channels(info, input, in_dims[1], 1),
        *rest,
    )
    return gradient.unflatten(0, (info.batch_size, -1)), 0


def _over_batch(info: Any, op: Any, dim: int, batched: Tensor, *rest: Any) -> tuple[Tensor, int]:
    batched = batched.movedim(dim, 0)
    result = op(batched.flatten(0, 1), *rest)
    return result.unflatten(0, batched.shape[:2]), 0


def _into_channels(info: Any, tensor: Tensor, dim: int | None, channel_dim: int) -> Tensor:
    """Fold a mapped dimension into the channels; repeat a tensor that is not mapped."""
    if dim is None:
        size = (*tensor.shape[:channel_dim], info.batch_size, *tensor.shape[channel_dim:])
        tensor = tensor.unsqueeze(channel_dim).expand(size)
    else:
        tensor = tensor.movedim(dim, channel_dim)
    return tensor.flatten(channel_dim, channel_dim + 1)


# Operation counts as torch.utils.flop_counter counts a convolution: two for each tap and output.


@register_flop_formula(torch.ops.replknet.depthwise_conv2d)
def _(input, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(out_shape) * prod(weight[2:])


@register_flop_formula(torch.ops.replknet.depthwise_conv2d_grad_input)
def _(grad_output, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(grad_output) * prod(weight[2:])


@register_flop_formula(torch.ops.replknet.depthwise_conv2d_grad_weight)
def _(grad_output, input, kernel_size, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(grad_output) * prod(kernel_size)

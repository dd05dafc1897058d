"""The depthwise convolution as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.ops import library, passes
from replknet.ops.algorithm import Convolve
from replknet.ops.arguments import (
    Padding,
    check_dtypes,
    check_shapes,
    check_tensors,
    four_sides,
    is_contiguous_weight,
    layout_by,
    make_problem,
    pair,
)
from replknet.ops.choose import known_name, pytorch_alone_is_faster, requested
from replknet.ops.eager import differentiated_by_transforms, is_ordinary, nothing_listens
from replknet.ops.problem import Problem

Size = int | tuple[int, int]

# Asked for once: some versions of torch.compile cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", torch._C._get_privateuse1_backend_name())
    if torch.amp.is_autocast_available(device)
)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Padding = "same",
    dilation: Size = 1,
    algorithm: str = "auto",
) -> Tensor:
    """Convolve each channel of ``input`` with its own filter.

    Args:
        input: (N, C, H, W) in either memory format, which the output keeps.
        weight: (C, 1, Kh, Kw), of any size, odd or even.
        bias: (C,).
        stride: one or (vertical, horizontal).
        padding: zeros around the map: one number, (vertical, horizontal), or (top, bottom, left,
            right); "same" keeps the map's size at stride 1, "valid" is 0.
        dilation: one or (vertical, horizontal).
        algorithm: "auto" takes the fastest by predicted cost, for each pass; see ``explain``. Maps
            so small that a call costs more than the work go to ``F.conv2d`` as they are.

    Returns:
        (N, C, H', W') in the dtype of the arguments: float32, float64, bfloat16 or float16. The
        last two are computed in float32 where the algorithm does so. Under autocast the arguments
        are cast as for ``torch.nn.functional.conv2d``.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit together.
        NotImplementedError: an unsupported dtype, or an algorithm asked for by name that cannot
            compute the problem.

    Algorithms by Fourier transform round to about 2e-7 of the largest value of a channel's map
    (6e-7 on large maps whose values have one sign), and let one NaN or Inf reach its whole map;
    ``algorithm="direct"`` or "torch" confines it to the receptive field.
    """
    return _call(input, weight, bias, stride, padding, dilation, False, algorithm)


def depthwise_conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Padding = "same",
    dilation: Size = 1,
    algorithm: str = "auto",
) -> Tensor:
    """``relu(depthwise_conv2d(...))`` in one pass over memory."""
    return _call(input, weight, bias, stride, padding, dilation, True, algorithm)


def _call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Padding,
    dilation: Size,
    relu: bool,
    algorithm: str,
) -> Tensor:
    if (
        nothing_listens()
        and is_ordinary(input)
        and is_ordinary(weight)
        and input.device == weight.device
        and (bias is None or (is_ordinary(bias) and input.device == bias.device))
    ):
        grads = 0
        if torch.is_grad_enabled():
            of_bias = bias is not None and bias.requires_grad
            grads = input.requires_grad + 2 * weight.requires_grad + 4 * of_bias
        convolve = _without_operator(
            input.device,
            input.shape,
            input.stride(),
            input.dtype,
            weight.shape,
            weight.stride(),
            weight.dtype,
            None if bias is None else bias.shape,
            None if bias is None else bias.stride(),
            None if bias is None else bias.dtype,
            tuple(stride) if isinstance(stride, list) else stride,
            tuple(padding) if isinstance(padding, list) else padding,
            tuple(dilation) if isinstance(dilation, list) else dilation,
            relu,
            algorithm,
            requested(algorithm),
            grads,
            torch.get_num_threads(),
        )
        return convolve(input, weight, bias)
    known_name(algorithm)
    device = input.device.type
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight = _autocast(input, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    check_tensors(input, weight, bias)
    steps, holes = pair("stride", stride, 1), pair("dilation", dilation, 1)
    sides = four_sides(padding, weight.shape[2:], steps, holes)
    if differentiated_by_transforms():  # which know no derivatives of operators from Python
        if requested(algorithm) not in ("auto", "torch"):
            raise NotImplementedError(
                f"algorithm {requested(algorithm)!r} has no derivatives for torch.func and "
                'forward-mode differentiation; use torch.autograd, or "auto" or "torch"'
            )
        return _as_aten(input, weight, bias, steps, sides, holes, relu, algorithm)
    return library.forward(input, weight, bias, steps, sides, holes, relu, algorithm)


@lru_cache(maxsize=4096)
def _without_operator(
    device: torch.device,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    weight_shape: Sequence[int],
    weight_strides: Sequence[int],
    weight_dtype: torch.dtype,
    bias_shape: Sequence[int] | None,
    bias_strides: Sequence[int] | None,
    bias_dtype: torch.dtype | None,
    stride: Size,
    padding: Padding,
    dilation: Size,
    relu: bool,
    algorithm: str,
    request: str,
    grads: int,
    threads: int,
) -> Convolve:
    """What computes such calls without PyTorch's dispatcher.

    Everything that it may depend on is an argument, so that a call takes one look-up.

    Args:
        request: What ``requested`` says of ``algorithm``.
        grads: Sum of 1, 2 and 4 for the gradients of input, weight and bias that may be wanted.
        threads: PyTorch's current number.
    """
    check_shapes(shape, weight_shape, bias_shape)
    check_dtypes(dtype, weight_dtype, bias_dtype)
    steps, holes = pair("stride", stride, 1), pair("dilation", dilation, 1)
    kernel_size = weight_shape[2:]
    sides = four_sides(padding, kernel_size, steps, holes)
    layout = layout_by(shape, strides)
    problem = make_problem(
        "forward", shape, kernel_size, steps, sides, holes, dtype, layout, device.type
    )
    if request == "auto" and not relu and _pytorch_is_faster(problem, grads):
        both, groups = problem.padding[::2], problem.channels
        return lambda input, weight, bias: F.conv2d(input, weight, bias, steps, both, holes, groups)
    in_place = (
        strides == problem.strides[0]
        and is_contiguous_weight(weight_shape, weight_strides)
        and bias_strides in (None, (1,))
    )
    convolve = passes.forward_of(problem, relu, algorithm, in_place)
    if not grads:
        return convolve
    return lambda input, weight, bias: library.DepthwiseConvolution.apply(
        input, weight, bias, steps, sides, holes, relu, algorithm, convolve
    )


def _pytorch_is_faster(forward: Problem, grads: int) -> bool:
    """Whether to leave a call to PyTorch, gradients of input (1) and weight (2) included."""
    top, bottom, left, right = forward.padding
    if (top, left) != (bottom, right) or 0 in (forward.batch, forward.height, forward.width):
        return False
    problems = [forward]
    if grads & 1:
        problems.append(replace(forward, pass_="grad_input"))
    if grads & 2:
        problems.append(replace(forward, pass_="grad_weight"))
    return pytorch_alone_is_faster(problems)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's autocast casts every floating-point tensor but float64."""
    casts = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if casts else tensor


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """The forward operator in terms of ``aten`` convolutions, for programs that leave PyTorch.

    For ``torch.export.ExportedProgram.run_decompositions``, before an export to ONNX.
    """
    return {torch.ops.replknet.depthwise_conv2d.default: _as_aten}


def _as_aten(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    algorithm: str,
) -> Tensor:
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        input = F.pad(input, (left, right, top, bottom))
        top, left = 0, 0
    output = F.conv2d(input, weight, bias, stride, (top, left), dilation, weight.shape[0])
    return output.relu() if relu else output

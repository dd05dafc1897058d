"""The depthwise convolution as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.ops import library
from replknet.ops.arguments import (
    Padding,
    check_tensors,
    four_sides,
    layout_of,
    make_problem,
    pair,
)
from replknet.ops.choose import known_name, pytorch_alone_is_faster, requested
from replknet.ops.problem import Layout

Size = int | tuple[int, int]


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

    Algorithms by Fourier transform round to about 2e-7 of the largest value of a channel's map,
    and let one NaN or Inf reach its whole map; ``algorithm="direct"`` or "torch" confines it to
    the receptive field.
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
    known_name(algorithm)
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight = _autocast(input, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    check_tensors(input, weight, bias)
    steps, holes = pair("stride", stride, 1), pair("dilation", dilation, 1)
    sides = four_sides(padding, weight.shape[2:], steps, holes)
    if not relu and algorithm == "auto" and _plain(input, weight, steps, sides, holes):
        return F.conv2d(input, weight, bias, steps, sides[::2], holes, weight.shape[0])
    return library.forward(input, weight, bias, steps, sides, holes, relu, algorithm)


def _plain(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> bool:
    """Whether to leave the whole call to PyTorch; a compiled graph keeps the operator."""
    if torch.compiler.is_compiling() or requested("auto") != "auto":
        return False
    grad = torch.is_grad_enabled()
    return _pytorch_is_faster(
        input.shape,
        (weight.shape[2], weight.shape[3]),
        stride,
        padding,
        dilation,
        input.dtype,
        layout_of(input),
        input.device.type,
        grad and input.requires_grad,
        grad and weight.requires_grad,
        torch.get_num_threads(),
    )


@lru_cache(maxsize=4096)
def _pytorch_is_faster(
    input_size: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    layout: Layout,
    device: str,
    input_gradient: bool,
    weight_gradient: bool,
    threads: int,
) -> bool:
    top, bottom, left, right = padding
    if (top, left) != (bottom, right) or 0 in input_size or device != "cpu":
        return False
    forward = make_problem(
        "forward", input_size, kernel_size, stride, padding, dilation, dtype, layout, device
    )
    problems = [forward]
    if input_gradient:
        problems.append(replace(forward, pass_="grad_input"))
    if weight_gradient:
        problems.append(replace(forward, pass_="grad_weight"))
    return pytorch_alone_is_faster(problems)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's autocast casts every floating-point tensor but float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """The forward operator in terms of ``aten`` convolutions, for programs that leave PyTorch.

    For ``torch.export.ExportedProgram.run_decompositions``, before an export to ONNX.
    """
    return {torch.ops.replknet.depthwise_conv2d.default: _as_aten}


def _as_aten(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    relu: bool,
    algorithm: str,
) -> Tensor:
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        input = F.pad(input, (left, right, top, bottom))
        top, left = 0, 0
    output = F.conv2d(input, weight, bias, stride, (top, left), dilation, weight.shape[0])
    return output.relu() if relu else output

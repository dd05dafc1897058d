"""The caller's arguments: brought to one form and checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from replknet.ops.problem import Layout, Pass, Problem

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Padding = int | tuple[int, int] | tuple[int, int, int, int] | str


def pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """``value`` as (vertical, horizontal), each at least ``minimum``."""
    values = (value, value) if isinstance(value, int | torch.SymInt) else tuple(value)
    if len(values) != 2 or any(v < minimum for v in values):
        raise ValueError(f"{name} must be one or two integers >= {minimum}, got {value!r}")
    return values[0], values[1]


def four_sides(
    padding: int | Sequence[int] | str,
    kernel_size: Sequence[int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """``padding`` as (top, bottom, left, right).

    "same" keeps the size of the map; an even kernel gets the extra zero at the bottom and right,
    as in ``torch.nn.functional.conv2d``.
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(
                f"padding='same' needs stride 1, got {stride}; pass the padding as integers"
            )
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
        return total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2
    if isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
    if not isinstance(padding, int | torch.SymInt) and len(padding) == 4:
        if any(side < 0 for side in padding):
            raise ValueError(f"padding must not be negative, got {tuple(padding)}")
        return padding[0], padding[1], padding[2], padding[3]
    vertical, horizontal = pair("padding", padding, 0)
    return vertical, vertical, horizontal, horizontal


def check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse tensors that do not describe a depthwise convolution."""
    check_shapes(input.shape, weight.shape, None if bias is None else bias.shape)
    check_dtypes(input.dtype, weight.dtype, None if bias is None else bias.dtype)
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.device != input.device:
            raise ValueError(
                f"input is on {input.device} but {name} is on {other.device}; use one device"
            )


def check_shapes(input: Sequence[int], weight: Sequence[int], bias: Sequence[int] | None) -> None:
    """Refuse shapes that do not fit together."""
    if len(input) != 4:
        raise ValueError(f"input must be (N, C, H, W), got shape {tuple(input)}")
    check_weight(weight)
    channels = weight[0]
    if input[1] != channels:
        raise ValueError(
            f"input has {input[1]} channels and weight {channels}; a depthwise convolution "
            "has one filter for each channel"
        )
    if bias is not None and tuple(bias) != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {tuple(bias)}")


def check_dtypes(input: torch.dtype, weight: torch.dtype, bias: torch.dtype | None) -> None:
    """Refuse unsupported and mixed dtypes."""
    if input not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise NotImplementedError(f"input has dtype {input}; supported are {names}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other != input:
            raise ValueError(f"input is {input} but {name} is {other}; use one dtype")


def check_weight(shape: Sequence[int]) -> None:
    """Refuse a weight that is not (C, 1, Kh, Kw)."""
    if len(shape) != 4 or shape[1] != 1:
        raise ValueError(f"weight must be (C, 1, Kh, Kw), got shape {tuple(shape)}")
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"weight must have at least one tap, got shape {tuple(shape)}")


def layout_of(tensor: Tensor) -> Layout:
    """Memory order of a tensor (N, C, H, W); "NCHW" when it could be read as either."""
    return layout_by(tensor.shape, tensor.stride())


def layout_by(shape: Sequence[int], strides: Sequence[int]) -> Layout:
    """``layout_of`` a tensor of these."""
    channels_innermost = strides[1] == 1 and shape[1] > 1
    one_pixel = shape[2] == 1 and shape[3] == 1
    return "NHWC" if channels_innermost and not one_pixel else "NCHW"


def is_contiguous_weight(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a weight (C, 1, Kh, Kw) of these lies in memory without gaps."""
    return (strides[0], *strides[2:]) == (shape[2] * shape[3], shape[3], 1)


def memory_format(layout: Layout) -> torch.memory_format:
    """PyTorch's name of a layout."""
    return torch.channels_last if layout == "NHWC" else torch.contiguous_format


def problem_of(
    input: Tensor,
    weight: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = "same",
    dilation: int | tuple[int, int] = 1,
    pass_: Pass = "forward",
) -> Problem:
    """The problem that ``depthwise_conv2d`` solves for these arguments in one pass."""
    check_tensors(input, weight, None)
    steps, holes = pair("stride", stride, 1), pair("dilation", dilation, 1)
    kernel_size = weight.shape[2:]
    return make_problem(
        pass_,
        input.shape,
        kernel_size,
        steps,
        four_sides(padding, kernel_size, steps, holes),
        holes,
        input.dtype,
        layout_of(input),
        input.device.type,
    )


def make_problem(
    pass_: Pass,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    layout: Layout,
    device: str,
) -> Problem:
    """A problem from sizes in their full form; refuses a kernel beyond the padded input."""
    problem = Problem(
        pass_=pass_,
        batch=input_size[0],
        channels=input_size[1],
        height=input_size[2],
        width=input_size[3],
        kernel_size=(kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        dilation=(dilation[0], dilation[1]),
        dtype=dtype,
        layout=layout,
        device=device,
    )
    _check_output(problem)
    return problem


def _check_output(problem: Problem) -> None:
    """Refuse a kernel that reaches beyond the padded input."""
    reach = tuple(
        d * (k - 1) + 1 for d, k in zip(problem.dilation, problem.kernel_size, strict=True)
    )
    top, bottom, left, right = problem.padding
    padded = (problem.height + top + bottom, problem.width + left + right)
    if reach[0] > padded[0] or reach[1] > padded[1]:
        raise ValueError(
            f"weight reaches over {reach[0]}x{reach[1]} pixels (kernel {problem.kernel_size}, "
            f"dilation {problem.dilation}) but the padded input has only {padded[0]}x{padded[1]}"
        )

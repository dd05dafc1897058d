"""Where a training step spends its time, by kind of operation, both passes together."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from replknet.analysis.model_split import LARGE_KERNEL
from replknet.ops.trained_blocks import native_seconds

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_NORMS = {"batch_norm", "layer_norm", "cudnn_batch_norm"}
_ACTIVATIONS = {"relu", "relu_", "threshold_backward", "gelu", "gelu_backward", "silu"}


def time_split(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of one ``call`` by kind of operation; "other" is all that has no kind.

    Activations within the native calls of residual blocks count as norms.
    """
    timer = _Timer()
    start = time.perf_counter()
    with timer, native_seconds() as natively:
        call()
    total = time.perf_counter() - start
    for branch in natively:
        timer.seconds["norm"] += branch.norms
        timer.seconds["pointwise, linear"] += branch.products
        for kernel_size, seconds in branch.kernels:
            timer.seconds[_depthwise(kernel_size)] += seconds
    split = dict(timer.seconds)
    return split | {"other": total - sum(split.values())}


def kind_of(name: str, arguments: Sequence[Any]) -> str | None:
    """Kind under which the time of an operator is booked, such as "aten::convolution"."""
    space, _, operator = name.partition("::")
    if space == "replknet" and operator.startswith("batch_norm"):
        return "norm"
    if space == "replknet" and operator.startswith("conv1x1"):
        return "pointwise, linear"
    if space == "replknet" and operator.startswith("depthwise_conv2d"):
        shapes = [tuple(a.shape[2:]) if isinstance(a, Tensor) else a for a in arguments]
        return _depthwise(shapes[2] if operator.endswith("grad_weight") else shapes[1])
    if operator.startswith("convolution"):
        weight = arguments[2] if operator == "convolution_backward" else arguments[1]
        return _convolution(weight.shape)
    operator = operator.removeprefix("native_")
    if operator in _PRODUCTS:
        return "pointwise, linear"
    if operator.removesuffix("_backward") in _NORMS:
        return "norm"
    if operator in _ACTIVATIONS:
        return "activation"
    if "attention" in operator or operator.startswith("_softmax"):
        return "attention"
    if operator.startswith("_fused_adam"):
        return "optimizer"
    return None


def _convolution(weight: Sequence[int]) -> str:
    _, channels, *kernel_size = weight
    if max(kernel_size) == 1:
        return "pointwise, linear"
    return _depthwise(kernel_size) if channels == 1 else "other convolution"


def _depthwise(kernel_size: Sequence[int]) -> str:
    return "large depthwise" if max(kernel_size) >= LARGE_KERNEL else "small depthwise"


class _Timer(TorchDispatchMode):
    """Adds up the time of each operator that has a kind, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = kind_of(func.name().partition(".")[0], args)
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if kind is not None:
            self.seconds[kind] += time.perf_counter() - start
        return result

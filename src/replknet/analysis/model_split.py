"""Where an optimized network spends its time, by kind of layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from replknet.analysis.model_engines import Call
from replknet.deploy.packed import FrozenDepthwiseConv2d, PackedConv2d, PackedMLP
from replknet.deploy.packed_stage import PackedRepLKNetStage
from replknet.ops.packed_blocks import large_kernel_seconds

LARGE_KERNEL = 9
"""Smallest kernel that counts as large."""


def time_split(model: nn.Module, call: Call, rounds: int) -> dict[str, float]:
    """Seconds of one ``call`` of ``model`` by kind of layer, the mean of ``rounds`` calls.

    Stages of RepLKNet run as they do untimed, one native call each, which tells the time of its
    large kernels; the rest of it is "pointwise". "other" is what the layers that are timed do not
    account for.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    stages = [m for m in model.modules() if isinstance(m, PackedRepLKNetStage)]
    with large_kernel_seconds() as natively:
        call()
    if len(natively) < len(stages):  # one of them runs layer by layer
        stages = []
    with _timed(model, stages, seconds):
        call()
        seconds.clear()
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        total = time.perf_counter() - start
    split = {kind: value / rounds for kind, value in seconds.items()}
    return split | {"other": total / rounds - sum(split.values())}


def kind_of(module: nn.Module) -> str | None:
    """Kind under which a layer's time is booked; None for layers that are not timed."""
    if isinstance(module, PackedConv2d | PackedMLP):
        return "pointwise"
    if isinstance(module, FrozenDepthwiseConv2d):
        large = max(module.kernel_size) >= LARGE_KERNEL
        return "large depthwise" if large else "small depthwise"
    if isinstance(module, nn.Conv2d):
        return "other convolution"
    if isinstance(module, nn.Linear):
        return "linear"
    return None


@contextmanager
def _timed(
    model: nn.Module, stages: list[PackedRepLKNetStage], seconds: defaultdict[str, float]
) -> Iterator[None]:
    started: dict[nn.Module, float] = {}
    within = {part for stage in stages for part in stage.modules()}
    layers = [m for m in model.modules() if kind_of(m) is not None and m not in within]

    def before(module: nn.Module, inputs: Any) -> None:
        started[module] = time.perf_counter()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        elapsed, large = time.perf_counter() - started[module], sum(natively)
        natively.clear()
        if large:
            seconds["large depthwise"] += large
        seconds[kind_of(module) or "pointwise"] += elapsed - large

    handles = []
    for module in (*layers, *stages):
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))
    try:
        with large_kernel_seconds() as natively:
            yield
    finally:
        for handle in handles:
            handle.remove()

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

LARGE_KERNEL = 9
"""Smallest kernel that counts as large."""


def time_split(model: nn.Module, call: Call, rounds: int) -> dict[str, float]:
    """Seconds of one ``call`` of ``model`` by kind of layer, the mean of ``rounds`` calls.

    "other" is what the layers that are timed do not account for.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    with _timed(model, seconds):
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
def _timed(model: nn.Module, seconds: defaultdict[str, float]) -> Iterator[None]:
    started: dict[nn.Module, float] = {}

    def before(module: nn.Module, inputs: Any) -> None:
        started[module] = time.perf_counter()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        seconds[str(kind_of(module))] += time.perf_counter() - started[module]

    handles = []
    for module in model.modules():
        if kind_of(module) is not None:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

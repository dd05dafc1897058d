"""Measure the cost table of ``replknet.ops.cost`` on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from replknet.ops.algorithm import ALGORITHMS, Algorithm
from replknet.ops.arguments import memory_format
from replknet.ops.cost import CostTable, Curve, key
from replknet.ops.problem import Layout, Pass, Problem
from replknet.ops.torch_conv import TorchConv

KERNEL_SIZES = [1, 3, 5, 7, 9, 11, 13, 17, 21, 31, 51]
MAP_SIZES = [4, 7, 14, 28, 56, 112]
PASSES: tuple[Pass, ...] = ("forward", "grad_input", "grad_weight")
Terms = tuple[float, float, float]
LAYOUTS: tuple[Layout, ...] = ("NCHW", "NHWC")
SECONDS_PER_TIMING = 0.005
FACTOR = 2  # between the batches and the channels compared: a difference within the caches
SLOW_SECONDS = 0.03  # a call this long is timed once; those of larger kernels are extrapolated


def calibrate(progress: Callable[[str], None] = lambda text: None) -> CostTable:
    """Time every algorithm, pass and layout with the current number of threads.

    Takes a few minutes. ``progress`` is told what is measured.
    """
    curves: dict[str, Curve] = {}
    for pass_ in PASSES:
        for layout in LAYOUTS:
            progress(f"{pass_} {layout}")
            curves |= _curves(pass_, layout)
    return CostTable(torch.get_num_threads(), KERNEL_SIZES, MAP_SIZES, curves)


def _curves(pass_: Pass, layout: Layout) -> dict[str, Curve]:
    """Every algorithm cell by cell: what else the machine does then hits all alike."""
    algorithms = {
        name: TorchConv(layout) if name == "torch" else algorithm
        for name, algorithm in ALGORITHMS.items()
    }
    rows: dict[str, list[list[Terms]]] = {name: [] for name in algorithms}
    for i, kernel_size in enumerate(KERNEL_SIZES):
        cells: dict[str, list[Terms]] = {name: [] for name in algorithms}
        for j, map_size in enumerate(MAP_SIZES):
            # A kernel larger than this would be trimmed to it.
            fitting = min(kernel_size, 2 * map_size - 1)
            for name, algorithm in algorithms.items():
                previous = rows[name][-1][j] if i else (0.0, 0.0, 0.0)
                if previous[2] * _channels() > SLOW_SECONDS:
                    growth = (kernel_size / KERNEL_SIZES[i - 1]) ** 2
                    cells[name].append((previous[0], previous[1], previous[2] * growth))
                else:
                    cells[name].append(_cell(algorithm, pass_, layout, fitting, map_size))
        for name, row in cells.items():
            rows[name].append(row)
    return {key(name, pass_, layout): _curve(table) for name, table in rows.items()}


def _curve(rows: list[list[Terms]]) -> Curve:
    call, channel, plane = (
        [[_nanoseconds(cell[term]) for cell in row] for row in rows] for term in range(3)
    )
    return Curve(call, channel, plane)


def _cell(
    algorithm: Algorithm, pass_: Pass, layout: Layout, kernel_size: int, map_size: int
) -> Terms:
    """Seconds of a call, for each channel, and for each channel of each image."""
    channels = _channels()

    def seconds(batch: int, channels: int) -> float:
        problem = _problem(pass_, layout, batch, channels, kernel_size, map_size)
        return _seconds(algorithm, problem)

    one = seconds(1, channels)
    if one > SLOW_SECONDS:
        return 0.0, 0.0, one / channels
    deep, wide = seconds(FACTOR, channels), seconds(1, FACTOR * channels)
    steps = (FACTOR - 1) * channels
    # Noise must not give all of the time to the other two.
    plane = min(max((deep - one) / steps, 0.2 * deep / (FACTOR * channels)), one / channels)
    channel = max(0.0, (wide - one) / steps - plane)
    return max(0.0, one - channels * (channel + plane)), channel, plane


def _channels() -> int:
    return 32 * torch.get_num_threads()


def _nanoseconds(seconds: float) -> float:
    return float(f"{max(1e9 * seconds, 0.01):.3g}")  # positive: the table is read on a log scale


def _problem(
    pass_: Pass, layout: Layout, batch: int, channels: int, kernel_size: int, map_size: int
) -> Problem:
    half = kernel_size // 2
    return Problem(
        pass_,
        batch,
        channels,
        map_size,
        map_size,
        (kernel_size, kernel_size),
        (1, 1),
        (half, half, half, half),
        (1, 1),
        torch.float32,
        layout,
        "cpu",
    )


def _seconds(algorithm: Algorithm, problem: Problem) -> float:
    """Least time of one call; what disturbs it only adds."""
    call = _call(algorithm, problem)
    first = _timed(call)
    if first > SLOW_SECONDS:
        return first
    times = [_timed(call)]
    while sum(times) < SECONDS_PER_TIMING or len(times) < 3:
        times.append(_timed(call))
    return min(times)


def _timed(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _call(algorithm: Algorithm, problem: Problem) -> Callable[[], Tensor]:
    size = (problem.batch, problem.channels, problem.height, problem.width)
    input = torch.randn(size).contiguous(memory_format=memory_format(problem.layout))
    grad_output = torch.randn_like(input)
    weight = torch.randn(problem.channels, 1, *problem.kernel_size)
    if problem.pass_ == "forward":
        return lambda: algorithm.forward(problem, input, weight, None, False)
    if problem.pass_ == "grad_input":
        return lambda: algorithm.grad_input(problem, grad_output, weight)
    return lambda: algorithm.grad_weight(problem, grad_output, input)

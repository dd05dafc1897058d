"""Measure the cost table of ``replknet.ops.cost`` on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from replknet.engine.allocator import keep_freed_memory
from replknet.ops.algorithm import ALGORITHMS, Algorithm
from replknet.ops.arguments import memory_format
from replknet.ops.cost import CostTable, Curve, key, widest_kernel
from replknet.ops.problem import Layout, Pass, Problem
from replknet.ops.torch_conv import TorchConv

KERNEL_SIZES = [1, 3, 5, 7, 9, 11, 13, 17, 21, 31, 51]
MAP_SIZES = [4, 7, 14, 28, 56, 112]
PASSES: tuple[Pass, ...] = ("forward", "grad_input", "grad_weight")
Terms = tuple[float, float, float]
LAYOUTS: tuple[Layout, ...] = ("NCHW", "NHWC")
SWEEPS = 3
SECONDS_PER_TIMING = 0.01  # new memory is slow for some calls
FACTOR = 2  # between the batches and the channels compared: a difference within the caches
SLOW_SECONDS = 0.03  # a call this long is timed once; those of larger kernels are extrapolated


def calibrate(progress: Callable[[str], None] = lambda text: None) -> CostTable:
    """Time every algorithm, pass and layout with the current number of threads.

    Takes a few minutes. ``progress`` is told what is measured.
    """
    keep_freed_memory()  # new pages take longer than small kernels on large maps
    curves = {(pass_, layout): _Curves(pass_, layout) for pass_ in PASSES for layout in LAYOUTS}
    for sweep in range(SWEEPS):  # minutes apart: what else the machine does seldom hits all
        for (pass_, layout), measured in curves.items():
            progress(f"{pass_} {layout}, sweep {sweep + 1} of {SWEEPS}")
            measured.sweep()
    tables = (measured.table() for measured in curves.values())
    together = {name: curve for table in tables for name, curve in table.items()}
    return CostTable(torch.get_num_threads(), KERNEL_SIZES, MAP_SIZES, together)


class _Curves:
    """Least times of the algorithms in one pass and layout.

    ``times[name, i, j]`` are those of the i-th kernel and j-th map, in seconds: a call with few
    channels, with a larger batch, with more channels; the last two infinite if the first is slow.
    """

    def __init__(self, pass_: Pass, layout: Layout) -> None:
        self.pass_, self.layout = pass_, layout
        self.times: dict[tuple[str, int, int], Terms] = {}
        self.algorithms = {
            name: TorchConv(layout) if name == "torch" else algorithm
            for name, algorithm in ALGORITHMS.items()
            if name != "triton"  # which has no kernels for the CPU
        }

    def sweep(self) -> None:
        """Time every cell once more, all algorithms next to each other; keep the least times."""
        for i, kernel_size in enumerate(KERNEL_SIZES):
            for j, map_size in enumerate(MAP_SIZES):
                fitting = min(kernel_size, widest_kernel(map_size))
                for name, algorithm in self.algorithms.items():
                    if self._is_slow(name, i - 1, j):
                        continue
                    known = self.times.get((name, i, j), (inf, inf, inf))
                    new = _times(algorithm, self.pass_, self.layout, fitting, map_size)
                    one, deep, wide = map(min, known, new)
                    self.times[name, i, j] = one, deep, wide

    def table(self) -> dict[str, Curve]:
        """The curves; slow cells by the area of the kernel."""
        curves = {}
        for name in self.algorithms:
            rows: list[list[Terms]] = []
            for i, kernel_size in enumerate(KERNEL_SIZES):
                row: list[Terms] = []
                for j in range(len(MAP_SIZES)):
                    if (name, i, j) in self.times:
                        row.append(_terms(*self.times[name, i, j]))
                    else:
                        call, channel, plane = rows[-1][j]
                        growth = (kernel_size / KERNEL_SIZES[i - 1]) ** 2
                        row.append((call, channel, plane * growth))
                rows.append(row)
            curves[key(name, self.pass_, self.layout)] = _curve(rows)
        return curves

    def _is_slow(self, name: str, i: int, j: int) -> bool:
        """Whether larger kernels than this are not worth timing."""
        if i < 0:
            return False
        return (name, i, j) not in self.times or self.times[name, i, j][0] > SLOW_SECONDS


def _curve(rows: list[list[Terms]]) -> Curve:
    call, channel, plane = (
        [[_nanoseconds(cell[term]) for cell in row] for row in rows] for term in range(3)
    )
    return Curve(call, channel, plane)


def _times(
    algorithm: Algorithm, pass_: Pass, layout: Layout, kernel_size: int, map_size: int
) -> Terms:
    """Seconds of a call, of one with a larger batch, and of one with more channels."""
    channels = _channels()

    def seconds(batch: int, channels: int) -> float:
        problem = _problem(pass_, layout, batch, channels, kernel_size, map_size)
        return _seconds(algorithm, problem)

    one = seconds(1, channels)
    if one > SLOW_SECONDS:
        return one, inf, inf
    return one, seconds(FACTOR, channels), seconds(1, FACTOR * channels)


def _terms(one: float, deep: float, wide: float) -> Terms:
    """Seconds of a call, for each channel, and for each channel of each image."""
    channels = _channels()
    if deep == inf:
        return 0.0, 0.0, one / channels
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

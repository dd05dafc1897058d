"""Predicted run times: a table of measurements for each algorithm, and interpolation.

Three tables come with the package: for AVX2, for AVX-512 (measured on an AMD EPYC of Zen 4; kernels
below 11x11 partly on an Intel Xeon) and for AMX (on the Xeon). ``replknet benchmark --calibrate``
measures one for the machine at hand and keeps it in the user's cache directory, by processor,
PyTorch and number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from math import exp, log, sqrt
from pathlib import Path

import torch

from replknet.ops import _binary
from replknet.ops.problem import Layout, Pass, Problem


@dataclass(frozen=True)
class Curve:
    """Times of one algorithm, pass and layout, in nanoseconds.

    With the i-th kernel size and the j-th map size of the table, a call takes ``call[i][j]``, and
    ``channel[i][j]`` more for each channel (the transform of the filter), and ``plane[i][j]`` more
    for each channel of each image.
    """

    call: list[list[float]]
    channel: list[list[float]]
    plane: list[list[float]]


@dataclass(frozen=True)
class CostTable:
    """Measured times over a grid of square kernels and maps, with ``threads`` threads."""

    threads: int
    kernel_sizes: list[int]
    map_sizes: list[int]
    curves: dict[str, Curve]

    def seconds(self, name: str, problem: Problem, layout: Layout, map_size: float) -> float:
        """Predict a call of algorithm ``name`` in ``layout`` on a map of ``map_size`` pixels a
        side."""
        curve = self.curves[key(name, problem.pass_, layout)]
        kernel_size = sqrt(problem.kernel_size[0] * problem.kernel_size[1])
        column, part = _position(self.map_sizes, map_size)
        call, per_channel, per_plane = (
            exp(
                (1 - part) * self._log(values, column, kernel_size)
                + part * self._log(values, column + 1, kernel_size)
            )
            for values in (curve.call, curve.channel, curve.plane)
        )
        beyond = max(1.0, map_size / self.map_sizes[-1]) ** 2
        scale = self.threads / torch.get_num_threads()
        planes = problem.batch * problem.channels
        variable = planes * per_plane * beyond + problem.channels * per_channel
        return 1e-9 * (call + scale * variable)

    def _log(self, values: list[list[float]], column: int, kernel_size: float) -> float:
        """Logarithm of a value on the maps of one column."""
        widest = widest_kernel(self.map_sizes[column])
        sizes = [size for size in self.kernel_sizes if size < widest]
        if len(sizes) < len(self.kernel_sizes):
            sizes.append(widest)
        row, part = _position(sizes, kernel_size)
        return (1 - part) * log(values[row][column]) + part * log(values[row + 1][column])

    def save(self, path: Path) -> None:
        """Write the table as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(path)

    @classmethod
    def parse(cls, text: str) -> CostTable:
        """Read what ``save`` wrote."""
        content = json.loads(text)
        curves = {name: Curve(**curve) for name, curve in content.pop("curves").items()}
        return cls(**content, curves=curves)


def widest_kernel(map_size: int) -> int:
    """The largest kernel that is not trimmed on square maps of a size: from any pixel to any."""
    return 2 * map_size - 1


def predict(name: str, problem: Problem, layout: Layout, map_size: float) -> float:
    """Seconds that algorithm ``name`` needs for ``problem`` when it computes in ``layout``.

    The time depends on the sizes through sqrt(kernel height x width) and ``map_size``, the side
    of a square map with as many pixels as the algorithm visits.
    """
    return cost_table(torch.get_num_threads()).seconds(name, problem, layout, map_size)


@lru_cache(maxsize=8)
def cost_table(threads: int) -> CostTable:
    """The machine's own table for this number of threads, else the one of the package."""
    path = calibration_file(threads)
    if path.exists():
        try:
            return CostTable.parse(path.read_text())
        except (ValueError, TypeError, KeyError, OSError) as error:
            warnings.warn(
                f"cannot read the calibration {path} ({error}); using the built-in costs. "
                "Run `replknet benchmark --calibrate` to write it anew.",
                stacklevel=2,
            )
    return CostTable.parse(files("replknet.ops").joinpath(_packaged()).read_text())


def _packaged() -> str:
    """The table of the package that is nearest to the instruction set in use."""
    isa = _binary.library.rk_isa().decode() if _binary.library else ""
    nearest = {"zen4": "avx512", "avx512": "avx512", "amx": "amx"}.get(isa, "avx2")
    return f"cost_{nearest}.json"


def calibration_file(threads: int) -> Path:
    """Where the calibration of this machine, PyTorch and number of threads is kept."""
    machine = (
        processor_name(),
        torch.backends.cpu.get_cpu_capability(),
        torch.__version__,
        str(threads),
    )
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256("|".join(machine).encode()).hexdigest()[:16]
    return Path(cache) / "replknet" / f"cost-{digest}.json"


def key(name: str, pass_: Pass, layout: Layout) -> str:
    """Name of a curve in a table."""
    return f"{name}/{pass_}/{layout}"


def _position(grid: list[int], value: float) -> tuple[int, float]:
    """Cell of ``value`` in an ascending grid and how far into it, on a logarithmic scale."""
    value = min(max(value, grid[0]), grid[-1])
    cell = min(bisect_right(grid, value), len(grid) - 1) - 1
    return cell, log(value / grid[cell]) / log(grid[cell + 1] / grid[cell])


def processor_name() -> str:
    """Model of the processor as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())

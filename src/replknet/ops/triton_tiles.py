"""Sizes of the tiles in which algorithm "triton" computes, and of its Toeplitz matrices."""

from __future__ import annotations

from dataclasses import dataclass

from replknet.ops.problem import Problem


@dataclass(frozen=True)
class ForwardTiles:
    """A product of ``items`` (block of rows, image) with ``rows`` x ``columns`` outputs.

    Each step multiplies by ``depth`` columns of the input.
    """

    items: int
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class WeightTiles:
    """Products of ``columns`` of the gradient with ``window`` of the input for ``rows`` of a filter.

    Each step adds up ``depth`` (row, image).
    """

    rows: int
    columns: int
    window: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Chunks:
    """The chunks of ``depth`` columns of the input that a tile of columns may meet.

    Chunk ``k`` starts ``k * depth`` columns right of the tile; ``low <= k < high``.
    """

    low: int
    high: int

    @property
    def count(self) -> int:
        return self.high - self.low


def chunks(tiles: ForwardTiles, width: int, output_w: int, kernel_w: int, left: int) -> Chunks:
    """Chunks that the filter reaches from some output of some tile."""
    low = -left // tiles.depth
    high = _ceil(tiles.columns + kernel_w - 1 - left, tiles.depth)
    if output_w <= tiles.columns:  # the only tile: nothing left or right of the map
        low, high = max(low, 0), min(high, _ceil(width, tiles.depth))
    return Chunks(low, max(high, low + 1))


def forward_tiles(
    terms: int, batch: int, output_h: int, output_w: int, kernel_w: int
) -> ForwardTiles:
    """Tiles for ``correlate``; measured on an H100."""
    columns = min(power_of_2(output_w, 8), 64 if output_w <= 64 else 32)
    rows = min(power_of_2(output_h), (128 if terms == 2 else 256) // columns)
    while rows > 1 and batch * _ceil(output_h, rows) < 64:
        rows //= 2
    rows = max(rows, 16 // columns)  # a product has at least 16 columns
    items = 128 if batch * _ceil(output_h, rows) > 64 else 64
    depth = min(max(columns, 16), 32)
    warps = 8 if items * rows * columns > 128 * 64 else 4
    return ForwardTiles(items, rows, columns, depth, warps, 3)


def weight_tiles(terms: int, width: int, output_w: int, kernel_w: int, left: int) -> WeightTiles:
    """Tiles for ``row_products``; measured on an H100."""
    columns = power_of_2(output_w, 16)
    if columns > 64 or width > 64:
        columns = 32
    window = power_of_2(-window_start(columns, output_w, left) + columns + kernel_w - 1 - left, 16)
    if output_w <= columns:
        window = power_of_2(width, 16)
    rows = max(1, (128 if terms == 2 else 256) // window)
    return WeightTiles(rows, columns, window, 64 if terms == 1 else 32, 8, 3)


def window_start(columns: int, output_w: int, left: int) -> int:
    """First column of the input, from that of a tile, that its products read: a multiple of 8."""
    return 0 if output_w <= columns else -left // 8 * 8


def splits(problem: Problem, tiles: WeightTiles) -> int:
    """Shares of the images and rows, for enough programs to fill a GPU."""
    programs = problem.channels * _ceil(problem.kernel_size[0], tiles.rows)
    steps = _ceil(problem.batch * problem.output_size[0], tiles.depth)
    return max(1, min(_ceil(512, programs), steps // 4))


def power_of_2(number: int, minimum: int = 1) -> int:
    """The smallest power of two that is at least ``number`` and ``minimum``."""
    return max(minimum, 1 << (number - 1).bit_length())


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)

"""How algorithm "triton" cuts a convolution into tiles: sizes for its kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

WORKSPACE_BYTES = 128 * 2**20  # of matrices at a time; channels that do not fit take turns


@dataclass(frozen=True)
class CorrelationTiles:
    """A product of ``items`` (block of rows, image) with ``rows`` x ``columns`` outputs.

    Each step multiplies by ``depth`` columns of the input. All but ``warps`` and ``stages`` are
    powers of two, and ``columns`` is a multiple of ``depth`` or covers the output.
    """

    items: int
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def lines(self) -> int:
        """Rows and columns of the product, each ``depth`` numbers long in a step."""
        return self.items + self.rows * self.columns


@dataclass(frozen=True)
class Correlation:
    """A correlation of (N, C, H, W) with (C, 1, Kh, Kw): its sizes and tiles.

    Padding may be negative. ``flip`` turns the filter by half a turn. ``terms`` is how many 16-bit
    numbers stand for one of the tensors'. The filter reaches the chunks ``chunk_low`` to
    ``chunk_high - 1`` of ``depth`` columns of the input, counted from a tile's first column.
    """

    batch: int
    channels: int
    height: int
    width: int
    output_h: int
    output_w: int
    kernel_h: int
    kernel_w: int
    top: int
    left: int
    flip: bool
    terms: int
    tiles: CorrelationTiles

    @property
    def chunks(self) -> tuple[int, int]:
        """``chunk_low`` and ``chunk_high``."""
        depth, columns = self.tiles.depth, self.tiles.columns
        low = -self.left // depth
        high = ceil_div(columns + self.kernel_w - 1 - self.left, depth)
        if self.output_w <= columns:  # the only tile: nothing left or right of the map
            low, high = max(low, 0), min(high, ceil_div(self.width, depth))
        return low, max(high, low + 1)

    @property
    def table_entries(self) -> int:
        """Numbers in the Toeplitz matrices of one term of a channel."""
        low, high = self.chunks
        rows = self.kernel_h + 2 * self.tiles.rows - 2
        return rows * (high - low) * self.tiles.depth * self.tiles.columns

    @property
    def programs(self) -> int:
        """Tiles of a channel's output."""
        items = self.batch * ceil_div(self.output_h, self.tiles.rows)
        return ceil_div(items, self.tiles.items) * ceil_div(self.output_w, self.tiles.columns)

    @property
    def channels_at_once(self) -> int:
        """Channels whose matrices fit the workspace."""
        return fitting(self.channels, 2 * self.terms * self.table_entries)


@dataclass(frozen=True)
class WeightTiles:
    """Products of ``columns`` of the gradient with ``window`` of the input.

    A program has those of ``rows`` rows of a filter. Each step adds up ``depth`` (row, image).
    All but ``warps`` and ``stages`` are powers of two.
    """

    rows: int
    columns: int
    window: int
    depth: int
    warps: int
    stages: int

    @property
    def lines(self) -> int:
        """Rows and columns of the product, each ``depth`` numbers long in a step."""
        return self.rows * self.window + self.columns


@dataclass(frozen=True)
class WeightGradient:
    """The gradient (C, 1, Kh, Kw) of a filter: its sizes and tiles.

    The products read the input from ``start`` columns right of a tile's first column on.
    """

    batch: int
    channels: int
    height: int
    width: int
    output_h: int
    output_w: int
    kernel_h: int
    kernel_w: int
    top: int
    left: int
    terms: int
    tiles: WeightTiles

    @property
    def start(self) -> int:
        """A multiple of eight; 0 for a map of one tile, all of which is read."""
        return window_start(self.tiles.columns, self.output_w, self.left)

    @property
    def blocks(self) -> int:
        """Blocks of rows of a filter."""
        return ceil_div(self.kernel_h, self.tiles.rows)

    @property
    def splits(self) -> int:
        """Shares of the images and rows: enough programs to fill a GPU."""
        steps = ceil_div(self.batch * self.output_h, self.tiles.depth)
        return max(1, min(ceil_div(512, self.channels * self.blocks), steps // 4))

    @property
    def images(self) -> int:
        """Images of a step, a power of two: so many that few of them are missing."""
        images = self.tiles.depth
        while ceil_div(self.batch, images) * images > 1.15 * self.batch:
            images //= 2
        return images

    @property
    def product_entries(self) -> int:
        """Numbers in the products of a channel."""
        tiles = self.tiles
        return self.splits * self.blocks * tiles.rows * tiles.columns * tiles.window

    @property
    def channels_at_once(self) -> int:
        """Channels whose products fit the workspace."""
        return fitting(self.channels, 4 * self.product_entries)


def correlation_tiles(terms: int, batch: int, output_h: int, output_w: int) -> CorrelationTiles:
    """Tiles for the output or the gradient of the input: on an H100 within 13 % of the fastest."""
    if 32 < output_w <= 64:
        columns, most_items, depth = 64, 128, 64
        products = 128 if terms == 2 else 256
    elif output_w > 64:
        columns, most_items, depth = 32, 64 if terms == 2 else 128, 16
        products = 128
    else:
        columns, most_items = power_of_2(output_w, 8), 64
        depth = max(columns, 16)
        products = 64 if terms == 2 else 256
    rows = min(power_of_2(output_h), products // columns)
    enough = 64 if columns > 16 else 32
    while rows > 1 and rows * columns > 64 and batch * ceil_div(output_h, rows) < enough:
        rows //= 2
    rows = max(rows, 16 // columns)  # a product has at least 16 columns
    items = min(power_of_2(batch * ceil_div(output_h, rows), 16), most_items)
    warps = 8 if columns == 64 and items * rows >= 256 else 4
    stages = 3 if columns == 64 or terms == 2 else 4
    return CorrelationTiles(items, rows, columns, depth, warps, stages)


def weight_tiles(
    terms: int, batch: int, width: int, output_h: int, output_w: int, kernel_w: int, left: int
) -> WeightTiles:
    """Tiles for the gradient of the weight: on an H100 within 13 % of the fastest."""
    columns = power_of_2(output_w, 16)
    # Few rows to add up: two tiles of columns share a product, which would take long to write.
    if columns > 64 or width > 64 or (columns == 64 and batch * output_h < 512):
        columns = 32
    tiled = output_w > columns
    reach = columns + kernel_w - 1 - left - window_start(columns, output_w, left)
    window = power_of_2(reach if tiled else width, 16)
    if columns == 64:
        entries, depth, warps, stages = (256, 64, 8, 2) if terms == 1 else (128, 32, 4, 3)
    elif tiled:
        entries, depth, warps, stages = 256, 64 if terms == 1 else 32, 4, 3
    elif columns == 32:
        entries, depth, warps, stages = 256 if terms == 1 else 64, 64, 4, 3
    else:
        entries, depth, warps, stages = 64, 128 if terms == 1 else 64, 4, 2
    return WeightTiles(max(1, entries // window), columns, window, depth, warps, stages)


Tiles = TypeVar("Tiles", CorrelationTiles, WeightTiles)


def within(shared_bytes: int, tiles: Tiles, terms: int) -> Tiles:
    """The tiles, with as few and small steps in flight as fit the GPU's shared memory."""
    while 2 * terms * tiles.depth * tiles.lines * tiles.stages > shared_bytes:
        if tiles.stages > 2:
            tiles = replace(tiles, stages=tiles.stages - 1)
        elif tiles.depth > 16:
            tiles = replace(tiles, depth=tiles.depth // 2)
        else:
            break
    return tiles


def window_start(columns: int, output_w: int, left: int) -> int:
    """First column of the input that products with a tile of ``columns`` read."""
    return 0 if output_w <= columns else -left // 8 * 8


def fitting(channels: int, bytes_per_channel: int) -> int:
    """Channels that fit the workspace."""
    return max(1, min(channels, WORKSPACE_BYTES // bytes_per_channel))


def power_of_2(number: int, minimum: int = 1) -> int:
    """The smallest power of two that is at least ``number`` and ``minimum``."""
    return max(minimum, 1 << (number - 1).bit_length())


def ceil_div(number: int, divisor: int) -> int:
    """``number / divisor``, rounded up."""
    return -(-number // divisor)

"""Algorithm "triton": products with Toeplitz matrices on the tensor cores of NVIDIA GPUs.

Computes 2 to 3 times the multiplications of the definition, at 15 times the rate. float32 goes as
three products of float16 (see ``triton_kernels``) and keeps float32's accuracy: errors are about
3e-7 of the largest value. One NaN or Inf makes its map NaN (float32), or the rows and columns
around it (float16, bfloat16). Two calls with equal arguments give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import inf

import torch
from torch import Tensor

from replknet.ops.algorithm import Support
from replknet.ops.problem import Problem
from replknet.ops.triton_tiles import (
    ForwardTiles,
    WeightTiles,
    chunks,
    forward_tiles,
    power_of_2,
    splits,
    weight_tiles,
    window_start,
)

WORKSPACE_BYTES = 128 * 2**20  # of matrices at a time; more channels than fit take turns
WIDEST_WINDOW = 512  # columns of the input that a tile of the weight gradient reads
PACK_ROWS, PACK_COLUMNS = 32, 64


class TritonConv:
    """Stride 1, dilation 1, and float32, float16 or bfloat16, on Ampere GPUs or newer."""

    name = "triton"

    def supports(self, problem: Problem) -> Support:
        if problem.device != "cuda":
            return Support(False, f"it computes on NVIDIA GPUs, not on {problem.device}")
        if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return Support(False, f"it computes float32, float16 and bfloat16, not {problem.dtype}")
        if problem.stride != (1, 1) or problem.dilation != (1, 1):
            return Support(
                False,
                f"it computes stride 1 and dilation 1, not {problem.stride} and {problem.dilation}",
            )
        window = weight_tiles_of(problem).window
        if problem.pass_ == "grad_weight" and window > WIDEST_WINDOW:
            return Support(False, f"a filter's row has {problem.kernel_size[1]} taps")
        return _machine_support()

    def cost(self, problem: Problem) -> float:
        """Nothing is predicted on GPUs, where this is never asked; see ``cuda_choice``."""
        return inf

    def forward(
        self, problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
    ) -> Tensor:
        top, _, left, _ = problem.padding
        tiles = forward_tiles(
            terms_of(problem), problem.batch, *problem.output_size, problem.kernel_size[1]
        )
        geometry = Correlation(problem.output_size, top, left, False, relu)
        return correlation(geometry, tiles, input, weight, bias)

    def grad_input(self, problem: Problem, grad_output: Tensor, weight: Tensor) -> Tensor:
        (kernel_h, kernel_w), (top, _, left, _) = problem.kernel_size, problem.padding
        size = problem.height, problem.width
        tiles = forward_tiles(terms_of(problem), problem.batch, *size, kernel_w)
        geometry = Correlation(size, kernel_h - 1 - top, kernel_w - 1 - left, True, False)
        return correlation(geometry, tiles, grad_output, weight, None)

    def grad_weight(self, problem: Problem, grad_output: Tensor, input: Tensor) -> Tensor:
        return weight_gradient(problem, weight_tiles_of(problem), grad_output, input)


@lru_cache(maxsize=1)
def _machine_support() -> Support:
    """Whether this machine's GPU and installation can run Triton's kernels."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return Support(False, "PyTorch sees no NVIDIA GPU")
    if find_spec("triton") is None:
        return Support(False, "Triton is not installed; `pip install triton`")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return Support(False, f"it needs compute capability 8.0, this GPU has {major}.{minor}")
    return Support(True)


def terms_of(problem: Problem) -> int:
    """16-bit numbers that stand for one of the problem's."""
    return 2 if problem.dtype == torch.float32 else 1


def weight_tiles_of(problem: Problem) -> WeightTiles:
    """Tiles for the gradient of the weight."""
    return weight_tiles(
        terms_of(problem),
        problem.width,
        problem.output_size[1],
        problem.kernel_size[1],
        problem.padding[2],
    )


@dataclass(frozen=True)
class Operand:
    """A tensor (terms, N, C, H, W) in 16 bits whose rows start at multiples of eight elements.

    ``largest`` (N, C) has the largest magnitudes by which two terms are scaled.
    """

    data: Tensor
    batch: int
    channels: int
    height: int
    pitch: int
    largest: Tensor | None

    @property
    def strides8(self) -> tuple[int, int, int, int]:
        """Strides of image, channel, row and term in groups of eight elements."""
        row = self.pitch // 8
        plane = self.height * row
        image = self.channels * plane
        return image, plane, row, self.batch * image


def operand(tensor: Tensor, one_scale: bool) -> Operand:
    """Bring a tensor (N, C, H, W) into the form of the products.

    ``one_scale`` scales all images of a channel alike, so that they may be added up.
    """
    from replknet.ops import triton_kernels as kernels

    tensor = tensor.contiguous()
    batch, channels, height, width = tensor.shape
    pitch = -(-width // 8) * 8
    terms = 2 if tensor.dtype == torch.float32 else 1
    if terms == 1 and pitch == width:
        return Operand(tensor, batch, channels, height, pitch, None)
    largest = None
    if terms == 2:
        largest = torch.linalg.vector_norm(tensor, inf, (2, 3))
        if one_scale:
            largest = largest.amax(0, keepdim=True).expand(batch, channels).contiguous()
    dtype = torch.float16 if terms == 2 else tensor.dtype
    data = torch.empty(
        (terms, batch, channels, height, pitch), dtype=dtype, device=tensor.device
    )
    rows = batch * channels * height
    columns = min(power_of_2(pitch), PACK_COLUMNS)
    grid = (-(-rows // PACK_ROWS), -(-pitch // columns))
    kernels.pack_rows[grid](
        tensor, data, largest, rows, height, width, pitch,
        TERMS=terms, ROWS=PACK_ROWS, COLUMNS=columns,
    )  # fmt: skip
    return Operand(data, batch, channels, height, pitch, largest)


@dataclass(frozen=True)
class Correlation:
    """Sizes of a correlation: of its output, its padding, and what else to do.

    Padding may be negative. ``flip`` turns the filter by half a turn.
    """

    output_size: tuple[int, int]
    top: int
    left: int
    flip: bool
    relu: bool


def correlation(
    geometry: Correlation,
    tiles: ForwardTiles,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Correlate (N, C, H, W) with (C, 1, Kh, Kw); the result is contiguous."""
    from replknet.ops import triton_kernels as kernels

    with torch.cuda.device_of(input):
        source = operand(input, one_scale=False)
        terms, data = (1 if source.largest is None else 2), source.data
        channels, _, kernel_h, kernel_w = weight.shape
        output_h, output_w = geometry.output_size
        output = torch.empty(
            (source.batch, channels, output_h, output_w), dtype=input.dtype, device=input.device
        )
        span = chunks(tiles, input.shape[3], output_w, kernel_w, geometry.left)
        rows = kernel_h + 2 * tiles.rows - 2
        per_channel = terms * rows * span.count * tiles.depth * tiles.columns
        step = max(1, min(channels, WORKSPACE_BYTES // (2 * per_channel)))
        table = torch.empty(step * per_channel, dtype=data.dtype, device=input.device)
        weight_largest = None
        if source.largest is not None:
            weight_largest = torch.linalg.vector_norm(weight, inf, (1, 2, 3))
        items = -(-source.batch * -(-output_h // tiles.rows) // tiles.items)
        tiles_of_channel = items * -(-output_w // tiles.columns)
        image8, channel8, row8, term8 = source.strides8
        for begin in range(0, channels, step):
            part = slice(begin, min(begin + step, channels))
            count = part.stop - begin
            part_largest = None if weight_largest is None else weight_largest[part]
            kernels.filter_matrices[(count * rows, span.count)](
                weight[part], table, part_largest,
                count, kernel_h, kernel_w, geometry.left, span.low, span.count,
                FLIP=geometry.flip, TERMS=terms,
                BY=tiles.rows, BN=tiles.columns, BK=tiles.depth,
            )  # fmt: skip
            kernels.correlate[(count * tiles_of_channel,)](
                data.flatten()[begin * channel8 * 8 :],
                table,
                None if bias is None else bias[part],
                output[:, begin:],
                None if source.largest is None else source.largest[:, begin:],
                part_largest,
                source.batch, count, source.height, source.pitch // 8, output_h, output_w,
                image8, channel8, row8, term8, *output.stride()[:2], channels,
                kernel_h, geometry.top, span.low, span.high,
                BIAS=bias is not None, RELU=geometry.relu, TERMS=terms,
                BM=tiles.items, BY=tiles.rows, BN=tiles.columns, BK=tiles.depth,
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
    return output


def weight_gradient(
    problem: Problem, tiles: WeightTiles, grad_output: Tensor, input: Tensor
) -> Tensor:
    """Gradient (C, 1, Kh, Kw) of the weight."""
    from replknet.ops import triton_kernels as kernels

    with torch.cuda.device_of(input):
        source, grad = operand(input, one_scale=True), operand(grad_output, one_scale=True)
        terms = 1 if source.largest is None else 2
        channels, (kernel_h, kernel_w) = problem.channels, problem.kernel_size
        top, _, left, _ = problem.padding
        output = input.new_empty(channels, 1, kernel_h, kernel_w)
        blocks, shares = -(-kernel_h // tiles.rows), splits(problem, tiles)
        start = window_start(tiles.columns, problem.output_size[1], left)
        per_channel = shares * blocks * tiles.rows * tiles.columns * tiles.window
        step = max(1, min(channels, WORKSPACE_BYTES // (4 * per_channel)))
        products = torch.empty(step * per_channel, dtype=torch.float32, device=input.device)
        for begin in range(0, channels, step):
            part = slice(begin, min(begin + step, channels))
            count = part.stop - begin
            kernels.row_products[(count * shares * blocks,)](
                source.data.flatten()[begin * source.strides8[1] * 8 :],
                grad.data.flatten()[begin * grad.strides8[1] * 8 :],
                products,
                None if source.largest is None else source.largest[0, part],
                None if grad.largest is None else grad.largest[0, part],
                source.batch, source.height, source.pitch // 8, grad.height, grad.pitch // 8,
                *source.strides8, *grad.strides8,
                blocks, shares, top, start // 8,
                TERMS=terms, BU=tiles.rows, BN=tiles.columns, BW=tiles.window, BR=tiles.depth,
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
            kernels.sum_diagonals[(count * kernel_h,)](
                products, output[part],
                kernel_h, kernel_w, blocks * tiles.rows, shares, -left - start,
                KX=power_of_2(kernel_w), BN=tiles.columns, BW=tiles.window,
            )  # fmt: skip
    return output

"""Algorithm "triton": products with Toeplitz matrices on the tensor cores of NVIDIA GPUs.

Computes 2 to 3 times the multiplications of the definition, on units of 11 times the rate. float32
goes as three products of float16 (see ``triton_kernels``) and keeps float32's accuracy. One NaN or
Inf may reach all of its map. Two calls with equal arguments give equal bits.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from math import inf

import torch
from torch import Tensor

from replknet.ops.algorithm import Support
from replknet.ops.problem import Problem
from replknet.ops.triton_tiles import (
    Correlation,
    WeightGradient,
    ceil_div,
    correlation_tiles,
    power_of_2,
    weight_tiles,
    within,
)

WIDEST_WINDOW = 512  # columns of the input that a tile of the weight gradient can read
PACKED_PIXELS = 4096  # in a step of a program
TABLE_ENTRIES = 2048  # of a program


class TritonConv:
    """Stride 1, dilation 1, and float32, float16 or bfloat16, on Ampere GPUs or newer."""

    name = "triton"
    folds_relu = True

    def supports(self, problem: Problem) -> Support:
        if problem.device != "cuda":
            return Support(False, f"it computes on NVIDIA GPUs, not on {problem.device}")
        if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return Support(False, f"it computes in float32 or 16 bits, not {problem.dtype}")
        if problem.stride != (1, 1) or problem.dilation != (1, 1):
            return Support(
                False,
                f"it computes stride and dilation 1, not {problem.stride} and {problem.dilation}",
            )
        if problem.pass_ == "grad_weight":
            window = plan_weight_gradient(problem).tiles.window
            if window > WIDEST_WINDOW:
                return Support(
                    False,
                    f"its weight gradient reads {WIDEST_WINDOW} columns at a time, and a filter "
                    f"{problem.kernel_size[1]} wide needs {window}",
                )
        return _machine_support()

    def cost(self, problem: Problem) -> float:
        """Never asked: ``choose`` predicts no times on GPUs, but see ``cuda_choice``."""
        return inf

    def forward(
        self, problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
    ) -> Tensor:
        return correlate(plan_correlation(problem), input, weight, bias, relu)

    def grad_input(self, problem: Problem, grad_output: Tensor, weight: Tensor) -> Tensor:
        return correlate(plan_correlation(problem), grad_output, weight, None, False)

    def grad_weight(self, problem: Problem, grad_output: Tensor, input: Tensor) -> Tensor:
        return weight_gradient(plan_weight_gradient(problem), grad_output, input)


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


@lru_cache(maxsize=1)
def shared_memory() -> int:
    """Bytes that a program may use on this GPU: 227 KiB on an H100, 99 on most others."""
    if not torch.cuda.is_available():
        return 227 * 1024
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return getattr(properties, "shared_memory_per_block_optin", 99 * 1024)


def terms_of(problem: Problem) -> int:
    """16-bit numbers that stand for one of the problem's."""
    return 2 if problem.dtype == torch.float32 else 1


@lru_cache(maxsize=4096)
def plan_correlation(problem: Problem) -> Correlation:
    """The correlation that computes the output, or the gradient of the input."""
    terms, (kernel_h, kernel_w) = terms_of(problem), problem.kernel_size
    top, _, left, _ = problem.padding
    source, target = (problem.height, problem.width), problem.output_size
    backward = problem.pass_ == "grad_input"
    if backward:
        source, target = target, source
        top, left = kernel_h - 1 - top, kernel_w - 1 - left
    return Correlation(
        problem.batch, problem.channels, *source, *target, kernel_h, kernel_w, top, left, backward,
        terms, within(shared_memory(), correlation_tiles(terms, problem.batch, *target), terms),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def plan_weight_gradient(problem: Problem) -> WeightGradient:
    """The gradient of the weight."""
    terms, (kernel_h, kernel_w) = terms_of(problem), problem.kernel_size
    (top, _, left, _), (output_h, output_w) = problem.padding, problem.output_size
    tiles = weight_tiles(terms, problem.batch, problem.width, output_h, output_w, kernel_w, left)
    return WeightGradient(
        problem.batch, problem.channels, problem.height, problem.width, output_h, output_w,
        kernel_h, kernel_w, top, left, terms, within(shared_memory(), tiles, terms),
    )  # fmt: skip


def correlate(
    plan: Correlation, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
) -> Tensor:
    """Correlate (N, C, H, W) with a contiguous (C, 1, Kh, Kw), add the bias and clamp at zero.

    The result (N, C, H', W') is contiguous.
    """
    from replknet.ops import triton_kernels as kernels

    with torch.cuda.device_of(input):
        data, largest = pack(input, one_scale=False)
        output = input.new_empty(plan.batch, plan.channels, plan.output_h, plan.output_w)
        weight_largest = None if largest is None else largest.new_empty(plan.channels)
        step, tiles, (low, high) = plan.channels_at_once, plan.tiles, plan.chunks
        entries = min(power_of_2(plan.table_entries), TABLE_ENTRIES)
        table = data.new_empty(step * plan.terms * plan.table_entries)
        unit = 8 if plan.output_w % 8 == 0 else 1
        for first in range(0, plan.channels, step):
            channels = min(step, plan.channels - first)
            kernels.filter_matrices[(channels, ceil_div(plan.table_entries, entries))](
                weight, table, weight_largest, first, channels, plan.kernel_h, plan.kernel_w,
                plan.left, low, high,
                FLIP=plan.flip, TERMS=plan.terms,
                BY=tiles.rows, BN=tiles.columns, BK=tiles.depth, ENTRIES=entries,
            )  # fmt: skip
            kernels.correlate[(channels * plan.programs,)](
                data, table, bias, output, largest, weight_largest, first, channels,
                plan.channels, plan.batch, plan.height, ceil_div(plan.width, 8),
                plan.output_h, plan.output_w // unit, plan.kernel_h, plan.top, low, high,
                BIAS=bias is not None, RELU=relu, UNIT=unit, TERMS=plan.terms,
                BM=tiles.items, BY=tiles.rows, BN=tiles.columns, BK=tiles.depth,
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
    return output


def weight_gradient(plan: WeightGradient, grad_output: Tensor, input: Tensor) -> Tensor:
    """Gradient (C, 1, Kh, Kw) of the weight, summed over the batch."""
    from replknet.ops import triton_kernels as kernels

    with torch.cuda.device_of(input):
        data, input_largest = pack(input, one_scale=True)
        grad, grad_largest = pack(grad_output, one_scale=True)
        output = input.new_empty(plan.channels, 1, plan.kernel_h, plan.kernel_w)
        step, tiles, blocks = plan.channels_at_once, plan.tiles, plan.blocks
        products = torch.empty(
            step * plan.product_entries, dtype=torch.float32, device=input.device
        )
        for first in range(0, plan.channels, step):
            channels = min(step, plan.channels - first)
            kernels.row_products[(channels * plan.splits * blocks,)](
                data, grad, products, input_largest, grad_largest, first, plan.channels,
                plan.batch, plan.height, ceil_div(plan.width, 8), plan.output_h,
                ceil_div(plan.output_w, 8), plan.kernel_h, plan.splits, plan.top, plan.start // 8,
                TERMS=plan.terms, BU=tiles.rows, BN=tiles.columns, BW=tiles.window,
                BR=tiles.depth, BI=plan.images,
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
            kernels.sum_diagonals[(channels * plan.kernel_h,)](
                products, output, first, plan.kernel_h, plan.kernel_w, blocks * tiles.rows,
                plan.splits, -plan.left - plan.start,
                KX=power_of_2(plan.kernel_w), BN=tiles.columns, BW=tiles.window,
            )  # fmt: skip
    return output


def pack(tensor: Tensor, one_scale: bool) -> tuple[Tensor, Tensor | None]:
    """A tensor (N, C, H, W) in 16 bits, with rows of a multiple of eight elements.

    float32 becomes (2, N, C, H, W'), scaled by the largest magnitudes, which are returned too:
    (N, C), or (C,) with ``one_scale``, which lets the images be added up.
    """
    from replknet.ops import triton_kernels as kernels

    tensor = tensor.contiguous()
    batch, channels, height, width = tensor.shape
    unit = 8 if width % 8 == 0 else 1
    if tensor.dtype != torch.float32 and unit == 8:
        return tensor, None
    pitch = ceil_div(width, 8) * 8
    largest, scale, terms, dtype = None, 0, 1, tensor.dtype
    if tensor.dtype == torch.float32:
        terms, dtype = 2, torch.float16
        if one_scale:
            largest, scale = torch.linalg.vector_norm(tensor, inf, (0, 2, 3)), 2
        else:
            largest, scale = tensor.new_empty(batch, channels), 1
    data = torch.empty((terms, batch, channels, height, pitch), dtype=dtype, device=tensor.device)
    pixels = min(power_of_2(height * pitch, 128), PACKED_PIXELS)
    planes = PACKED_PIXELS // pixels
    kernels.pack_planes[(ceil_div(batch * channels, planes),)](
        tensor, data, largest, batch, channels, height, width // unit,
        UNIT=unit, SCALE=scale, PLANES=planes, PIXELS=pixels,
    )  # fmt: skip
    return data, largest

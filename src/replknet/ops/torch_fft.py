"""Algorithm "torch_fft": products of real Fourier transforms, on any device.

Costs O(log) operations an output whatever the kernel size. Rounding errors are about 1e-7 of the
largest value of a channel's map (float32) and uniform over it; one NaN or Inf reaches all of it.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from replknet.ops.algorithm import Support
from replknet.ops.cost import predict
from replknet.ops.problem import Problem

WORKSPACE_BYTES = 16 * 2**20  # of spectra at a time; more channels than fit take turns


class TorchFFT:
    """Circular convolution, on a circle just large enough that no kept output is an alias."""

    name = "torch_fft"
    folds_relu = False

    def supports(self, problem: Problem) -> Support:
        if problem.device not in ("cpu", "cuda", "xpu"):
            return Support(False, f"torch.fft is not known to work on {problem.device}")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        width = 2.0 if problem.dtype == torch.float64 else 1.0
        map_size = sqrt(problem.height * problem.width)
        return width * predict(self.name, problem, problem.layout, map_size)

    def forward(
        self, problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
    ) -> Tensor:
        circle = _circle(problem)
        rows, columns = _extent(problem)
        chunks = []
        for part in _channel_chunks(problem, circle):
            spectrum = (
                _spectrum(input[:, part], circle)
                * _filter(problem, weight[part], circle).conj_physical_()
            )
            output = torch.fft.irfft2(spectrum, s=circle)
            output = output[..., : rows : problem.stride[0], : columns : problem.stride[1]]
            if bias is not None:
                output = output + bias[part, None, None]
            chunks.append(output.relu() if relu else output)
        return torch.cat(chunks, 1).to(input.dtype)

    def grad_input(self, problem: Problem, grad_output: Tensor, weight: Tensor) -> Tensor:
        circle = _circle(problem)
        chunks = []
        for part in _channel_chunks(problem, circle):
            spectrum = _spectrum(_spread(problem, grad_output[:, part]), circle)
            spectrum *= _filter(problem, weight[part], circle)
            gradient = torch.fft.irfft2(spectrum, s=circle)
            chunks.append(gradient[..., : problem.height, : problem.width])
        return torch.cat(chunks, 1).to(grad_output.dtype)

    def grad_weight(self, problem: Problem, grad_output: Tensor, input: Tensor) -> Tensor:
        circle = _circle(problem)
        reach_h, reach_w = _reach(problem)
        chunks = []
        for part in _channel_chunks(problem, circle):
            spectrum = _spectrum(_spread(problem, grad_output[:, part]), circle).conj_physical_()
            spectrum = (spectrum * _spectrum(input[:, part], circle)).sum(0)
            gradient = torch.fft.irfft2(spectrum, s=circle)
            gradient = gradient.roll((problem.padding[0], problem.padding[2]), (-2, -1))
            chunks.append(
                gradient[:, None, : reach_h : problem.dilation[0], : reach_w : problem.dilation[1]]
            )
        return torch.cat(chunks, 0).to(input.dtype)


def _circle(problem: Problem) -> tuple[int, int]:
    """Height and width of the circular transform.

    Along one axis the outputs read positions from -low to size + high - 1. On a circle of
    size + max(low, high) those outside the map meet no pixel, so that only outputs that are
    dropped are aliased. The circle must also hold the kernel and the outputs.
    """
    top, bottom, left, right = problem.padding
    (reach_h, reach_w), (rows, columns) = _reach(problem), _extent(problem)
    return (
        _good_size(max(problem.height + max(top, bottom), reach_h, rows)),
        _good_size(max(problem.width + max(left, right), reach_w, columns)),
    )


def _good_size(size: int) -> int:
    """Smallest number not below ``size`` without prime factors above 7, for a fast transform."""
    while True:
        rest = size
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def _reach(problem: Problem) -> tuple[int, int]:
    """Height and width of the dilated kernel."""
    (kernel_h, kernel_w), (dilation_h, dilation_w) = problem.kernel_size, problem.dilation
    return dilation_h * (kernel_h - 1) + 1, dilation_w * (kernel_w - 1) + 1


def _extent(problem: Problem) -> tuple[int, int]:
    """Height and width of the outputs at stride 1."""
    (output_h, output_w), (stride_h, stride_w) = problem.output_size, problem.stride
    return stride_h * (output_h - 1) + 1, stride_w * (output_w - 1) + 1


def _channel_chunks(problem: Problem, circle: tuple[int, int]) -> list[slice]:
    """Ranges of channels whose spectra fit the workspace."""
    bytes_per_channel = (problem.batch + 1) * circle[0] * (circle[1] // 2 + 1) * 8
    step = max(1, WORKSPACE_BYTES // bytes_per_channel)
    return [slice(c, min(c + step, problem.channels)) for c in range(0, problem.channels, step)]


def _spectrum(map: Tensor, circle: tuple[int, int]) -> Tensor:
    """Transform of each plane, padded with zeros to the circle."""
    if map.dtype in (torch.float16, torch.bfloat16):
        map = map.float()
    return torch.fft.rfft2(map.contiguous(), s=circle)


def _filter(problem: Problem, weight: Tensor, circle: tuple[int, int]) -> Tensor:
    """Transform (C, P, P // 2 + 1) of the dilated kernels, with the tap of offset 0 at (0, 0)."""
    spread = weight.new_zeros(weight.shape[0], *circle)
    reach_h, reach_w = _reach(problem)
    spread[:, : reach_h : problem.dilation[0], : reach_w : problem.dilation[1]] = weight[:, 0]
    return _spectrum(spread.roll((-problem.padding[0], -problem.padding[2]), (-2, -1)), circle)


def _spread(problem: Problem, grad_output: Tensor) -> Tensor:
    """Outputs' gradient at stride 1, with zeros between."""
    if problem.stride == (1, 1):
        return grad_output
    spread = grad_output.new_zeros(*grad_output.shape[:2], *_extent(problem))
    spread[..., :: problem.stride[0], :: problem.stride[1]] = grad_output
    return spread

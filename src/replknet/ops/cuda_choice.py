"""What "auto" takes on CUDA: a rule from the times of one H100 (docs/gpu.md).

PyTorch's own kernels take a time proportional to the multiplications. Those of ``triton`` hardly
depend on the kernel, but a call launches two to six of them, each 25 microseconds of Python. So a
convolution must be large enough, and the smallest kernels stay with PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from replknet.ops.problem import Layout, Pass, Problem


@dataclass(frozen=True)
class Least:
    """The smallest convolution that an algorithm is taken for."""

    taps: int  # of a filter
    work: float  # multiplications, see ``work``

    def allows(self, taps: int, work: float) -> bool:
        return taps >= self.taps and work >= self.work


# By pass, and whether numbers have 16 bits.
_TRITON: dict[tuple[Pass, bool], Least] = {
    ("forward", False): Least(49, 1.6e8),
    ("forward", True): Least(49, 1.2e8),
    ("grad_input", False): Least(49, 8e7),
    ("grad_input", True): Least(49, 7e7),
    ("grad_weight", False): Least(49, 5e7),
    ("grad_weight", True): Least(49, 4.5e7),
}
_TRITON_SMALL_KERNEL = Least(25, 2e8)
# Without ``triton``.
_TORCH_FFT: dict[Pass, Least] = {
    "forward": Least(400, 5e8),
    "grad_input": Least(250, 3e8),
    "grad_weight": Least(100, 1.2e8),
}
_NHWC_SIDE = 7  # beyond, PyTorch's channels_last kernels are up to 11 times slower


def fastest(problem: Problem, able: set[str]) -> str:
    """The algorithm, of those ``able`` to compute it, that "auto" takes for a CUDA problem."""
    if torch.version.hip is not None:  # PyTorch calls AMD's GPUs "cuda"; nothing was measured there
        return "torch"
    taps, size = problem.kernel_size[0] * problem.kernel_size[1], work(problem)
    key = problem.pass_, problem.dtype in (torch.float16, torch.bfloat16)
    if "triton" in able:
        large = _TRITON[key].allows(taps, size) or _TRITON_SMALL_KERNEL.allows(taps, size)
        fast = problem.layout == "NHWC" and pytorch_layout(problem) == "NHWC"
        return "triton" if large and not fast else "torch"
    measured = problem.dtype != torch.float64 and problem.stride == problem.dilation == (1, 1)
    if "torch_fft" in able and measured and _TORCH_FFT[problem.pass_].allows(taps, size):
        return "torch_fft"
    return "torch"


def work(problem: Problem) -> float:
    """Multiplications that PyTorch's kernels do.

    Those on padding are left out, but for the gradient of the weight.
    """
    rows, columns = problem.output_size
    planes = problem.batch * problem.channels
    if problem.pass_ == "grad_weight":
        return float(planes * rows * columns * problem.kernel_size[0] * problem.kernel_size[1])
    top, _, left, _ = problem.padding
    vertical = _pairs_on_map(rows, problem.height, problem, 0, top)
    horizontal = _pairs_on_map(columns, problem.width, problem, 1, left)
    return float(planes * vertical * horizontal)


def _pairs_on_map(outputs: int, size: int, problem: Problem, axis: int, low: int) -> int:
    """Pairs of an output and a tap, along one axis, that meet the map."""
    taps, stride, step = problem.kernel_size[axis], problem.stride[axis], problem.dilation[axis]
    pairs = 0
    for start in range(-low, outputs * stride - low, stride):  # of an output's taps
        first = max(0, -(start // step))
        pairs += max(0, min(taps - 1, (size - 1 - start) // step) - first + 1)
    return pairs


def pytorch_layout(problem: Problem) -> Layout:
    """The memory format in which PyTorch's own kernels are faster, for a CUDA problem."""
    if torch.version.hip is not None:
        return problem.layout
    side = max(problem.kernel_size)
    slow = side > _NHWC_SIDE or (
        side == _NHWC_SIDE and problem.pass_ == "grad_weight" and problem.dtype == torch.float32
    )
    return "NCHW" if slow and problem.dtype != torch.float64 else problem.layout

"""The machine that measurements were taken on."""

from __future__ import annotations

import platform

import torch

from replknet.ops import native
from replknet.ops.cost import processor_name


def describe_machine() -> dict[str, str]:
    """What a measured time depends on."""
    return {
        "processor": processor_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def fma_peak_gflops(threads: int) -> float | None:
    """Float32 multiply-adds that ``threads`` threads reach, two operations each.

    None without the native core.
    """
    return None if native.why_missing() else 1e-9 * native.fma_peak(threads)

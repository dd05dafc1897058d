"""The machine that measurements were taken on."""

from __future__ import annotations

import platform

import torch

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
    """Measured peak of multiply-adds, or None without the native core."""
    return None

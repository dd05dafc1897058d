"""Automatic mixed precision."""

from __future__ import annotations

import torch
from torch.amp import GradScaler

from replknet.engine.config import ExecutionConfig


def autocast(execution: ExecutionConfig, device: torch.device) -> torch.autocast:
    """Context that computes in ``execution.precision``; does nothing for float32."""
    dtype = getattr(torch, execution.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def grad_scaler(execution: ExecutionConfig, device: torch.device) -> GradScaler:
    """Loss scaling for float16, whose gradients would underflow; does nothing otherwise."""
    return GradScaler(device.type, enabled=execution.precision == "float16")

"""The published learning-rate schedule, as a function of the optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from replknet.engine.config import ScheduleConfig


def learning_rate(step: int, peak: float, config: ScheduleConfig, steps_per_epoch: int) -> float:
    """Learning rate of ``step`` (from 0): linear from 0 to ``peak``, then cosine to ``min_lr``.

    As in the authors' code, step 0 has rate 0, and both the last step of the warm-up and the
    first of the cosine have the peak. (timm's scheduler reaches the peak one step later.)
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    progress = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
    return config.min_lr + 0.5 * (peak - config.min_lr) * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group ``rate`` times its ``lr_scale`` (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)

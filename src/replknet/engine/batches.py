"""Batches on their way from the loader to the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from replknet.engine.config import ExecutionConfig


def to_device(batch: Any, device: torch.device, execution: ExecutionConfig) -> Any:
    """``batch`` with its tensors on ``device``, images (4-D) in the memory format of the model."""
    if isinstance(batch, Tensor):
        if execution.channels_last and batch.ndim == 4:
            return batch.to(device, non_blocking=True, memory_format=torch.channels_last)
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device, execution) for key, value in batch.items()}
    if isinstance(batch, list):
        return [to_device(value, device, execution) for value in batch]
    if isinstance(batch, tuple):
        return tuple(to_device(value, device, execution) for value in batch)
    return batch


def grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` consecutive batches; an incomplete last one is dropped."""
    iterator = iter(batches)
    while len(group := list(islice(iterator, size))) == size:
        yield group

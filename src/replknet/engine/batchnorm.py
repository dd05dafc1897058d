"""Batch normalization with the statistics of all processes, on the CPU, where PyTorch has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from replknet.nn.norm import record_statistics


class _MeanOverProcesses(torch.autograd.Function):
    """Mean of a tensor over the processes; so is the gradient's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        mean = values.clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _MeanOverProcesses.forward(ctx, gradient)


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that trains with the statistics of all processes' equal shares of a batch.

    Input and output: (batch, channels, height, width), the same shape in every process.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        mean = _MeanOverProcesses.apply(input.mean((0, 2, 3)))
        centered = input - mean[:, None, None]
        variance = _MeanOverProcesses.apply(centered.square().mean((0, 2, 3)))
        count = input[:, 0].numel() * dist.get_world_size()
        record_statistics(self, mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            return centered * (scale * self.weight)[:, None, None] + self.bias[:, None, None]
        return centered * scale[:, None, None]


def synchronize(model: nn.Module) -> None:
    """Let every ``nn.BatchNorm2d`` of ``model`` train with the statistics of all processes."""
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SynchronizedBatchNorm2d

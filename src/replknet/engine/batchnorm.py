"""Batch normalization with the statistics of all processes, on the CPU, where PyTorch has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
        self._record(mean.detach(), variance.detach(), input[:, 0].numel() * dist.get_world_size())
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            return centered * (scale * self.weight)[:, None, None] + self.bias[:, None, None]
        return centered * scale[:, None, None]

    def _record(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics; ``count`` values were seen for each channel."""
        if self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        assert momentum is not None
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)


def synchronize(model: nn.Module) -> None:
    """Let every ``nn.BatchNorm2d`` of ``model`` train with the statistics of all processes."""
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SynchronizedBatchNorm2d

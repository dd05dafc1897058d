"""Batch norm and the activation behind it, as one operation while training on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeGuard

from torch import Tensor, nn

from replknet.nn.hooks import has_hooks
from replknet.ops.batch_norm import batch_norm, suits_native


class FusingSequential(nn.Sequential):
    """``nn.Sequential`` that runs each batch norm together with the activation behind it."""

    def forward(self, input: Tensor) -> Tensor:
        return run_layers(self, input)


def is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether ``module`` runs its children one after the other."""
    forward = type(module).forward
    return forward in (nn.Sequential.forward, FusingSequential.forward)


def run_layers(layers: Iterable[nn.Module], input: Tensor) -> Tensor:
    """The layers one after the other, each batch norm together with the activation behind it."""
    rest = list(layers)
    while rest:
        layer = rest.pop(0)
        if rest and isinstance(layer, nn.BatchNorm2d):
            input = norm_act(layer, rest.pop(0), input)
        else:
            input = layer(input)
    return input


def norm_act(norm: nn.Module, activation: nn.Module, input: Tensor) -> Tensor:
    """``activation(norm(input))`` on (N, C, H, W).

    One native operation, which keeps one map less for the backward pass, for an ``nn.BatchNorm2d``
    in training mode with an ``nn.ReLU`` or exact ``nn.GELU`` behind it, on float32 channels-last
    maps of a CPU; the two modules elsewhere, and where either has hooks.
    """
    name = activation_name(activation)
    if (
        name is not None
        and type(norm) is nn.BatchNorm2d
        and norm.training
        and suits_native(input, norm.weight, norm.bias)
        and not (has_hooks(norm) or has_hooks(activation))
    ):
        output, mean, variance = batch_norm(input, norm.weight, norm.bias, norm.eps, name)
        record_statistics(norm, mean, variance, input.numel() // input.shape[1])
        return output
    output = activation(norm(input))
    return output


def record_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move the running statistics as ``nn.BatchNorm2d`` does.

    Args:
        norm: Layer in training mode.
        mean: Mean of each channel over the batch, (C,).
        variance: Biased variance, (C,).
        count: Values seen for each channel.
    """
    if norm.running_mean is None or norm.running_var is None:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    assert momentum is not None
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)


def activation_name(activation: nn.Module) -> Literal["relu", "gelu"] | None:
    """Name of a plain ReLU or exact GELU."""
    if type(activation) is nn.ReLU:
        return "relu"
    if type(activation) is nn.GELU and activation.approximate == "none":
        return "gelu"
    return None

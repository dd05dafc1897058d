"""The arithmetic of folding: a batch norm is an affine map of each channel, in float64."""

from __future__ import annotations

from typing import TypeGuard

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import FrozenBatchNorm2d

from replknet.nn import DepthwiseConv2d, PointwiseConv2d
from replknet.nn.hooks import has_hooks

# Norms whose evaluation is known: exactly these types, as a subclass may compute something else.
NORMS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    FrozenBatchNorm2d,
    BatchNormAct2d,
    SyncBatchNormAct,
    FrozenBatchNormAct2d,
)
_CONVOLUTIONS = (
    nn.Conv2d._conv_forward,
    DepthwiseConv2d._conv_forward,
    PointwiseConv2d._conv_forward,
)


def is_norm(module: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether ``module`` is one of ``NORMS`` with fixed statistics in evaluation mode."""
    return (
        type(module) in NORMS
        and getattr(module, "running_mean", None) is not None
        and getattr(module, "running_var", None) is not None
        and is_open(module)
    )


def is_plain_norm(module: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether ``module`` is a norm without an activation of its own."""
    return is_norm(module) and isinstance(norm_tail(module), nn.Identity)


def is_convolution(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` computes exactly what ``nn.Conv2d`` does."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and type(module)._conv_forward in _CONVOLUTIONS
        and is_open(module)
    )


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether ``module`` computes exactly what ``nn.Linear`` does."""
    return type(module) is nn.Linear and is_open(module)


def is_open(module: nn.Module | None) -> bool:
    """Whether nobody watches the module, computes its weights or gave it another forward."""
    return module is not None and not is_parametrized(module) and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether a call of ``module`` does more than the forward of its class."""
    return has_hooks(module) or "forward" in vars(module)


def norm_tail(norm: nn.Module) -> nn.Module:
    """What remains of a norm once its affine map is folded elsewhere: its activation, if any."""
    parts = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    if not parts:
        return nn.Identity()
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) in float64: ``norm(x) = scale * x + shift`` in evaluation mode.

    Raises:
        ValueError: The norm has no running statistics.
    """
    mean, variance, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if mean is None or variance is None:
        raise ValueError("a batch norm without running statistics is no fixed affine map")
    scale = torch.rsqrt(double(variance) + norm.eps)
    if weight is not None:
        scale = scale * double(weight)
    shift = -double(mean) * scale
    if bias is not None:
        shift = shift + double(bias)
    return scale, shift


def fold_norm_after(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Make ``layer`` compute ``norm(layer(x))``."""
    scale, shift = norm_affine(norm)
    bias = shift if layer.bias is None else shift + scale * double(layer.bias)
    set_weights(layer, double(layer.weight) * scale[:, None, None, None], bias)


def fold_norm_before(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d) -> None:
    """Make ``layer`` compute ``layer(norm(x))``; exact for a linear or an unpadded convolution."""
    scale, shift = norm_affine(norm)
    weight = double(layer.weight)
    outputs, inputs_per_group = weight.shape[:2]
    groups = scale.numel() // inputs_per_group
    by_group = weight.reshape(groups, outputs // groups, inputs_per_group, -1)
    bias = torch.einsum("goik,gi->go", by_group, shift.reshape(groups, -1)).reshape(outputs)
    if layer.bias is not None:
        bias = bias + double(layer.bias)
    scaled = by_group * scale.reshape(groups, 1, inputs_per_group, 1)
    set_weights(layer, scaled.reshape(weight.shape), bias)


def set_weights(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Give ``layer`` new float64 weights in its own dtype, device, layout and grad setting."""
    old = layer.weight
    new = torch.empty_like(old).copy_(weight)
    layer.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old), requires_grad=old.requires_grad)


def neutralize(norm: nn.BatchNorm2d) -> None:
    """Make ``norm`` hand on what it is given, but for its activation, if it has one."""
    values = {"running_mean": 0.0, "running_var": 1 - norm.eps, "weight": 1.0, "bias": 0.0}
    for name, value in values.items():
        old = getattr(norm, name)
        if old is not None:
            # A new tensor: another norm may share the old one.
            new = torch.full_like(old, value)
            parameter = isinstance(old, nn.Parameter)
            setattr(norm, name, nn.Parameter(new, old.requires_grad) if parameter else new)


def double(tensor: Tensor) -> Tensor:
    """Detached float64 copy, on the same device unless that has no float64."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device=device, dtype=torch.float64)

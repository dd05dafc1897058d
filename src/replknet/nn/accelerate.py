"""Put the depthwise convolutions of any PyTorch model on the operator."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from replknet.nn.depthwise import DepthwiseConv2d
from replknet.ops.arguments import DTYPES


@dataclass(frozen=True)
class Replacement:
    """What becomes of one depthwise convolution of a model."""

    name: str  # of the module in the model
    layer: str
    reason: str  # why it stays as it is; empty when it is put on the operator


@dataclass(frozen=True)
class AccelerationReport:
    """What becomes of every depthwise convolution of a model."""

    layers: tuple[Replacement, ...]

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the modules that are put on the operator."""
        return tuple(layer.name for layer in self.layers if not layer.reason)

    def __str__(self) -> str:
        counts = f"{len(self.replaced)} of {len(self.layers)}"
        lines = [f"{counts} depthwise convolutions to be put on the operator"]
        lines += [f"  {x.name}: {x.layer}: {x.reason or 'replaced'}" for x in self.layers]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> nn.Module:
    """Copy a model, with every eligible depthwise ``nn.Conv2d`` as a ``DepthwiseConv2d``.

    Everything else is as ``copy.deepcopy`` leaves it: parameters, state dict names, hooks.
    ``acceleration_report`` says what is replaced and why not the rest. All kernel sizes are
    eligible, because the operator itself takes PyTorch's convolution where that is faster.
    """
    copy = deepcopy(model)
    for module in copy.modules():
        if _is_depthwise(module) and not _obstacle(module):
            # The subclass adds no state, so that the layer keeps its parameters and its hooks.
            module.__class__ = DepthwiseConv2d
    return copy


def acceleration_report(model: nn.Module) -> AccelerationReport:
    """Say which depthwise convolutions ``accelerate`` replaces in a model, and why not the rest."""
    return AccelerationReport(
        tuple(
            Replacement(name, f"{type(module).__name__}({module.extra_repr()})", _obstacle(module))
            for name, module in model.named_modules()
            if _is_depthwise(module)
        )
    )


def _is_depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _obstacle(conv: nn.Conv2d) -> str:
    """Why the operator cannot take over a depthwise convolution; empty when it can."""
    if isinstance(conv, DepthwiseConv2d):
        return "is on the operator already"
    if type(conv) is not nn.Conv2d:
        return "is a subclass of nn.Conv2d, which may compute something else"
    if conv.out_channels != conv.in_channels:
        return f"has {conv.out_channels // conv.in_channels} filters a channel, not one"
    if conv.weight.dtype not in DTYPES:
        return f"has weights of {conv.weight.dtype}"
    return ""

"""A network as any runtime could have it: on PyTorch's own convolutions, folded or not."""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from replknet.deploy.fuse import fuse
from replknet.deploy.reparameterize import reparameterize
from replknet.nn import DepthwiseConv2d, PointwiseConv2d
from replknet.nn.norm import FusingSequential

# Layers of this package, and those of PyTorch that they derive from and share their state with.
_BASES: dict[type[nn.Module], type[nn.Module]] = {
    DepthwiseConv2d: nn.Conv2d,
    PointwiseConv2d: nn.Conv2d,
    FusingSequential: nn.Sequential,
}


def plain(model: nn.Module) -> nn.Module:
    """Copy of ``model``, merged and fused, whose convolutions are all PyTorch's own."""
    return on_pytorch(fuse(reparameterize(model))).requires_grad_(False)


def on_pytorch(model: nn.Module) -> nn.Module:
    """Copy of ``model`` that runs on PyTorch's own layers alone; the inverse of ``accelerate``."""
    network = deepcopy(model)
    for layer in network.modules():
        layer.__class__ = _BASES.get(type(layer), type(layer))
    return network

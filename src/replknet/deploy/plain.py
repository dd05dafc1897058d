"""A network as any runtime could have it: on PyTorch's own convolutions, folded or not."""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from replknet.deploy.fuse import fuse
from replknet.deploy.reparameterize import reparameterize
from replknet.nn import DepthwiseConv2d, PointwiseConv2d
from replknet.nn.norm import FusingSequential


def plain(model: nn.Module) -> nn.Module:
    """Copy of ``model``, merged and fused, whose convolutions are all PyTorch's own."""
    return on_pytorch(fuse(reparameterize(model))).requires_grad_(False)


def on_pytorch(model: nn.Module) -> nn.Module:
    """Copy of ``model`` that runs on PyTorch's own layers alone; the inverse of ``accelerate``."""
    network = deepcopy(model)
    for layer in network.modules():  # each becomes its base, of the same state
        if isinstance(layer, DepthwiseConv2d | PointwiseConv2d):
            layer.__class__ = nn.Conv2d  # type: ignore[assignment]
        elif isinstance(layer, FusingSequential):
            layer.__class__ = nn.Sequential  # type: ignore[assignment]
    return network

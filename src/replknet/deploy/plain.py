"""A trained network as any runtime could have it: folded, on PyTorch's own convolutions."""

from __future__ import annotations

from torch import nn

from replknet.deploy.fuse import fuse
from replknet.deploy.reparameterize import reparameterize
from replknet.nn import DepthwiseConv2d


def plain(model: nn.Module) -> nn.Module:
    """Copy of ``model``, merged and fused, whose convolutions are all PyTorch's own."""
    network = fuse(reparameterize(model)).requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, DepthwiseConv2d):
            layer.__class__ = nn.Conv2d  # type: ignore[assignment]  # its base, of the same state
    return network

"""Make a trained network fast on this machine, without changing what it computes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from timm.layers import GELU, Mlp
from torch import Tensor, nn

from replknet.deploy.equivalence import compare
from replknet.deploy.folding import NORMS, has_hooks, is_convolution, is_linear
from replknet.deploy.fuse import fuse
from replknet.deploy.packed import FrozenDepthwiseConv2d, PackedConv2d, PackedMLP
from replknet.deploy.reparameterize import reparameterize
from replknet.models.replknet import ConvFFN, RepLKBlock
from replknet.ops.pointwise import Activation, why_not_native

TOLERANCE = 1e-4
"""Largest difference that ``example_input`` may show, in units of the outputs' spread."""

_HANDLED = (PackedConv2d, PackedMLP, FrozenDepthwiseConv2d)


class InferenceRepLKBlock(nn.Module):
    """``x + pw2(relu(LK(relu(pw1(x)))))`` in three passes over memory."""

    def __init__(self, block: RepLKBlock) -> None:
        super().__init__()
        assert_type = block.large_kernel.lkb_reparam
        self.pw1 = PackedConv2d(block.pw1.conv, "relu")
        self.large_kernel = FrozenDepthwiseConv2d(assert_type, relu=True)
        self.pw2 = PackedConv2d(block.pw2.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.large_kernel(self.pw1(x)), residual=x)

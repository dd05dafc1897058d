"""Inference layers of RepLKNet: its blocks, and stages that are one native call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from replknet.deploy.packed import FrozenDepthwiseConv2d, PackedConv2d, PackedMLP
from replknet.nn.hooks import has_hooks
from replknet.ops.choose import requested
from replknet.ops.native import isa
from replknet.ops.packed_blocks import Block, Blocks
from replknet.ops.packed_pointwise import Layer, why_not_native


class PackedRepLKBlock(nn.Module):
    """``x + pw2(relu(LK(relu(pw1(x)))))``; the convolutions of a fused ``RepLKBlock``."""

    def __init__(self, pw1: nn.Conv2d, large_kernel: nn.Conv2d, pw2: nn.Conv2d) -> None:
        super().__init__()
        self.pw1 = PackedConv2d(pw1, "relu")
        self.large_kernel = FrozenDepthwiseConv2d(large_kernel, relu=True)
        self.pw2 = PackedConv2d(pw2)

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """``overwrite`` gives up ``x``: its memory may become the result's."""
        return self.pw2(self.large_kernel(self.pw1(x)), x, overwrite)

    def native(self, x: Tensor) -> Block | None:
        """This module as ``Blocks`` takes it, for maps like ``x``, if it can run natively."""
        first, second = self.pw1.layer, self.pw2.layer
        if not _suits(x, first, second):
            return None
        kernel = self.large_kernel.native(x)
        return None if kernel is None else Block(first, second, kernel)


class PackedConvFFN(nn.Module):
    """``x + pw2(gelu(pw1(x)))``; the convolutions of a fused ``ConvFFN``."""

    def __init__(self, pw1: nn.Conv2d, pw2: nn.Conv2d) -> None:
        super().__init__()
        self.mlp = PackedMLP(pw1, pw2, "gelu")

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """``overwrite`` gives up ``x``: its memory may become the result's."""
        return self.mlp(x, x, overwrite)

    def native(self, x: Tensor) -> Block | None:
        """This module as ``Blocks`` takes it, for maps like ``x``, if it can run natively."""
        first, second = self.mlp.first.layer, self.mlp.second.layer
        return Block(first, second) if _suits(x, first, second) else None


class PackedRepLKNetStage(nn.Module):
    """Blocks of which each but the first writes over what it is given.

    One native call computes them all, unless one of them has hooks or cannot run there. What the
    call takes is kept for the last size of map, and made anew when something changes.
    """

    blocks: nn.ModuleList

    def __init__(self, blocks: list[PackedRepLKBlock | PackedConvFFN], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm  # applied by the network, as that of ``RepLKNetStage``
        self._kept: _Kept | None = None

    def forward(self, x: Tensor) -> Tensor:
        native = self._native(x)
        if native is not None:
            return native(x)
        for place, block in enumerate(self.blocks):
            x = block(x, overwrite=place > 0)
        return x

    def _native(self, x: Tensor) -> Blocks | None:
        """All blocks for maps like ``x``, if all of them can run natively and nobody watches."""
        parts = _with_parts(self.blocks)
        if why_not_native(x) or any(map(has_hooks, parts)):
            return None
        buffers = [b for part in parts for b in part._buffers.values() if b is not None]
        if torch.is_grad_enabled() and any(b.requires_grad for b in buffers):
            return None
        state = (
            *(x.shape, torch.get_num_threads(), isa(), requested("auto")),
            *map(id, parts),
            *map(id, buffers),
            *map(Tensor.data_ptr, buffers),
            *(b._version for b in buffers if not b.is_inference()),
        )
        kept = self._kept
        if kept is None or kept.state != state:
            kept = self._kept = _Kept(state, self._prepare(x), (parts, buffers))
        return kept.native

    def _prepare(self, x: Tensor) -> Blocks | None:
        found: list[Block] = []
        for block in self.blocks:
            native = cast(PackedRepLKBlock | PackedConvFFN, block).native(x)
            if native is None:
                return None
            found.append(native)
        return Blocks(found) if found else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}


@dataclass(frozen=True)
class _Kept:
    """What a stage has prepared, and the state of all that it depends on."""

    state: tuple[object, ...]
    native: Blocks | None
    named: object
    """What the state names by ``id``, which is another's once they are gone."""


def _with_parts(module: nn.Module) -> list[nn.Module]:
    """``module`` and all within it: ``modules()``, which takes three times as long."""
    found = [module]
    for part in found:
        if part._modules:
            found.extend(child for child in part._modules.values() if child is not None)
    return found


def _suits(x: Tensor, first: Layer, second: Layer) -> bool:
    """Whether a residual block of these layers can run natively on ``x``."""
    fits = x.dim() == 4 and x.shape[1] == first.in_channels == second.out_channels
    return fits and x.numel() > 0 and not why_not_native(x, first.weight, second.weight)

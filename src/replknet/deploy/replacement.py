"""Which inference layer takes the place of which module."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeGuard, cast

from timm.layers import Mlp
from timm.layers.activations import GELU
from torch import Tensor, nn

from replknet.deploy.folding import is_convolution, is_linear
from replknet.deploy.packed import FrozenDepthwiseConv2d, PackedConv2d, PackedMLP
from replknet.models.replknet import ConvFFN, RepLKBlock, RepLKNetStage
from replknet.nn.norm import has_hooks
from replknet.ops.blocks import Block, run_blocks
from replknet.ops.pointwise import Activation, Layer, why_not_native


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
        """What ``run_blocks`` computes instead of this module, for maps like ``x``, if it can."""
        first, second = self.pw1.layer, self.pw2.layer
        watched = any(map(has_hooks, (self, self.pw1, self.large_kernel, self.pw2)))
        if watched or not _suits(x, first, second):
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
        """What ``run_blocks`` computes instead of this module, for maps like ``x``, if it can."""
        first, second = self.mlp.first.layer, self.mlp.second.layer
        watched = has_hooks(self) or has_hooks(self.mlp)
        return None if watched or not _suits(x, first, second) else Block(first, second)


class PackedRepLKNetStage(nn.Module):
    """Blocks of which each but the first writes over what it is given.

    One native call computes them all, unless one of them has hooks or cannot run there.
    """

    blocks: nn.ModuleList

    def __init__(self, blocks: list[PackedRepLKBlock | PackedConvFFN], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm  # applied by the network, as that of ``RepLKNetStage``

    def forward(self, x: Tensor) -> Tensor:
        blocks = self._native(x)
        if blocks:
            return run_blocks(x, blocks)
        for place, block in enumerate(self.blocks):
            x = block(x, overwrite=place > 0)
        return x

    def _native(self, x: Tensor) -> list[Block]:
        """What ``run_blocks`` takes for all blocks; empty if it cannot compute one of them."""
        found: list[Block] = []
        for block in self.blocks:
            native = cast(PackedRepLKBlock | PackedConvFFN, block).native(x)
            if native is None:
                return []
            found.append(native)
        return found


def _suits(x: Tensor, first: Layer, second: Layer) -> bool:
    """Whether a residual block of these layers can run natively on ``x``."""
    fits = x.dim() == 4 and x.shape[1] == first.in_channels == second.out_channels
    return fits and x.numel() > 0 and not why_not_native(x, first.weight, second.weight)


def replacement(module: nn.Module) -> nn.Module | None:
    """Inference layer that computes what ``module`` does in evaluation mode, if there is one."""
    if type(module) is RepLKNetStage:
        return _stage(module)
    if type(module) is RepLKBlock:
        return _replk_block(module)
    if type(module) is ConvFFN:
        return _conv_ffn(module)
    if type(module) is Mlp:
        return _mlp(module)
    if is_pointwise(module):
        return PackedConv2d(module)
    if is_depthwise(module):
        return FrozenDepthwiseConv2d(module)
    return None


def replace_in_sequence(sequence: nn.Sequential) -> None:
    """Replace, in place, the convolutions of a sequence that an activation follows, with it."""
    # Not named_children(), which leaves out a module's second place.
    layers = [(n, m) for n, m in sequence._modules.items() if not isinstance(m, nn.Identity)]
    for (name, layer), (following, activation) in pairwise(layers):
        kind = activation_of(activation)
        fused: nn.Module | None = None
        if kind is not None and is_pointwise(layer):
            fused = PackedConv2d(layer, kind)
        elif kind == "relu" and is_depthwise(layer):
            fused = FrozenDepthwiseConv2d(layer, relu=True)
        if fused is not None:
            sequence.set_submodule(name, fused)
            sequence.set_submodule(following, nn.Identity())
        elif kind == "relu" and is_convolution(layer):
            sequence.set_submodule(following, nn.ReLU(inplace=True))


def is_pointwise(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` is a convolution that multiplies each pixel with one matrix."""
    return isinstance(module, nn.Conv2d) and not obstacle(module) and module.groups == 1


def is_depthwise(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` is a convolution with one filter a channel."""
    return isinstance(module, nn.Conv2d) and not obstacle(module) and module.groups > 1


def obstacle(conv: nn.Conv2d) -> str:
    """Why no inference layer computes this convolution; empty when one does."""
    if not is_convolution(conv):
        return "is a subclass, has hooks or computes its weights"
    if conv.padding_mode != "zeros":
        return f"pads with padding_mode={conv.padding_mode!r}"
    if conv.groups == conv.in_channels == conv.out_channels:
        return ""
    if conv.groups > 1:
        return f"has {conv.groups} groups of {conv.in_channels // conv.groups} channels"
    if conv.kernel_size != (1, 1):
        return f"is dense with a {conv.kernel_size[0]}x{conv.kernel_size[1]} kernel"
    if conv.stride != (1, 1):
        return f"has stride {conv.stride}"
    if conv.padding not in ((0, 0), "valid", "same"):
        return f"pads a 1x1 kernel by {conv.padding}"
    return ""


def activation_of(module: nn.Module | None) -> Activation | None:
    """Name of an activation that the product can apply; None for any other module."""
    if module is None or has_hooks(module):
        return None
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is GELU or (type(module) is nn.GELU and module.approximate == "none"):
        return "gelu"
    return None


def _unit(unit: nn.Sequential) -> list[nn.Module]:
    """Convolution and activation of a conv-BN-activation unit whose norm is folded away."""
    return [part for part in unit.children() if not isinstance(part, nn.Identity)]


def _stage(stage: RepLKNetStage) -> nn.Module | None:
    blocks = [replacement(block) for block in stage.blocks]
    packed = [block for block in blocks if isinstance(block, (PackedRepLKBlock, PackedConvFFN))]
    return PackedRepLKNetStage(packed, stage.norm) if len(packed) == len(blocks) else None


def _replk_block(block: RepLKBlock) -> nn.Module | None:
    parts = [*_unit(block.pw1), block.large_kernel.lkb_reparam, block.lk_nonlinear]
    match [block.prelkb_bn, *parts, *_unit(block.pw2)]:
        case [nn.Identity(), pw1, nn.ReLU(), large_kernel, nn.ReLU(), pw2]:
            if is_pointwise(pw1) and is_depthwise(large_kernel) and is_pointwise(pw2):
                return PackedRepLKBlock(pw1, large_kernel, pw2)
    return None


def _conv_ffn(block: ConvFFN) -> nn.Module | None:
    match [block.preffn_bn, *_unit(block.pw1), block.nonlinear, *_unit(block.pw2)]:
        case [nn.Identity(), pw1, activation, pw2]:
            if is_pointwise(pw1) and activation_of(activation) == "gelu" and is_pointwise(pw2):
                return PackedConvFFN(pw1, pw2)
    return None


def _mlp(mlp: Mlp) -> nn.Module | None:
    layers, activation = (mlp.fc1, mlp.fc2), activation_of(mlp.act)
    products = all(map(is_pointwise, layers)) or all(map(is_linear, layers))
    if products and activation is not None and isinstance(mlp.norm, nn.Identity):
        return PackedMLP(*layers, activation)
    return None

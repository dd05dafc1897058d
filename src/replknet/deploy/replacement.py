"""Which inference layer takes the place of which module."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeGuard

from timm.layers import Mlp
from timm.layers.activations import GELU
from torch import nn

from replknet.deploy.banded import BandedSequential, suit_bands, unit_layers
from replknet.deploy.folding import is_convolution, is_linear, is_watched
from replknet.deploy.packed import FrozenDepthwiseConv2d, PackedConv2d, PackedMLP
from replknet.deploy.packed_stage import PackedConvFFN, PackedRepLKBlock, PackedRepLKNetStage
from replknet.models.replknet import ConvFFN, RepLKBlock, RepLKNet, RepLKNetStage
from replknet.nn.hooks import has_hooks
from replknet.ops.activation import Activation


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


def replace_in_sequence(sequence: nn.Sequential, in_parts: set[nn.Module]) -> None:
    """Replace, in place, the convolutions of a sequence that an activation follows, with it.

    Not those of ``in_parts``, whose parameters are needed.
    """
    # Not named_children(), which leaves out a module's second place.
    layers = [(n, m) for n, m in sequence._modules.items() if not isinstance(m, nn.Identity)]
    for (name, layer), (following, activation) in pairwise(layers):
        kind = None if layer in in_parts else activation_of(activation)
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


def replace_between_stages(network: RepLKNet) -> None:
    """Replace, in place, stem and transitions, whose convolutions have been replaced already."""
    parents = [(network, "stem"), *((network.transitions, n) for n in network.transitions._modules)]
    for parent, name in parents:
        units = parent.get_submodule(name)
        if type(units) is nn.Sequential and not has_hooks(units) and suit_bands(units):
            parent.set_submodule(name, BandedSequential(*units))


def is_pointwise(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` is a convolution that multiplies each pixel with one matrix."""
    return isinstance(module, nn.Conv2d) and not obstacle(module) and not _is_depthwise(module)


def is_depthwise(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` is a convolution with one filter a channel."""
    return isinstance(module, nn.Conv2d) and not obstacle(module) and _is_depthwise(module)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels


def obstacle(conv: nn.Conv2d) -> str:
    """Why no inference layer computes this convolution; empty when one does."""
    if not is_convolution(conv):
        return "is a subclass, has hooks or computes its weights"
    if conv.padding_mode != "zeros":
        return f"pads with padding_mode={conv.padding_mode!r}"
    if _is_depthwise(conv):
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
    if module is None or is_watched(module):
        return None
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is GELU or (type(module) is nn.GELU and module.approximate == "none"):
        return "gelu"
    return None


def _stage(stage: RepLKNetStage) -> nn.Module | None:
    blocks = [replacement(block) for block in stage.blocks]
    packed = [block for block in blocks if isinstance(block, (PackedRepLKBlock, PackedConvFFN))]
    return PackedRepLKNetStage(packed, stage.norm) if len(packed) == len(blocks) else None


def _replk_block(block: RepLKBlock) -> nn.Module | None:
    parts = [*unit_layers(block.pw1), block.large_kernel.lkb_reparam, block.lk_nonlinear]
    match [block.prelkb_bn, *parts, *unit_layers(block.pw2)]:
        case [nn.Identity(), pw1, nn.ReLU(), large_kernel, nn.ReLU(), pw2]:
            if is_pointwise(pw1) and is_depthwise(large_kernel) and is_pointwise(pw2):
                return PackedRepLKBlock(pw1, large_kernel, pw2)
    return None


def _conv_ffn(block: ConvFFN) -> nn.Module | None:
    match [block.preffn_bn, *unit_layers(block.pw1), block.nonlinear, *unit_layers(block.pw2)]:
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

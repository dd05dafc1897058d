"""Residual blocks, and how they run in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from replknet.nn.depthwise import DepthwiseConv2d
from replknet.nn.hooks import has_hooks
from replknet.nn.norm import FusingSequential, activation_name, run_layers
from replknet.nn.pointwise import PointwiseConv2d
from replknet.nn.reparam import DepthwiseBN, ReparamLargeKernelConv
from replknet.ops.branch import Branch, Statistics
from replknet.ops.trained_blocks import add_branches, may_pay, pays

MOST_TOGETHER = 4
"""Blocks that train in one call, and keep their maps until all of them have their gradients."""


class ResidualBlock(nn.Module):
    """``x + drop_path(layers(x))`` on (N, C, H, W).

    In training on a CPU for which the native core has vectors, each pass is one native call, if the
    layers are those of RepLKNet's blocks and nobody observes them.
    """

    drop_path: nn.Module

    def layers(self) -> Sequence[nn.Module]:
        """What runs one after the other."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        branch = native_branch(self, x)
        if branch is not None:
            return add_branches(x, [branch])
        return x + self.drop_path(run_layers(_opened(self.layers()), x))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The blocks one after the other, those that train natively a few in a call."""
    branches: list[Branch] = []
    for block in blocks:
        branch = None
        if isinstance(block, ResidualBlock) and not has_hooks(block):
            branch = native_branch(block, x)
        if branches and (branch is None or len(branches) == MOST_TOGETHER):
            x, branches = add_branches(x, branches), []
        if branch is None:
            x = block(x)
        else:
            branches.append(branch)
    return add_branches(x, branches) if branches else x


def native_branch(block: ResidualBlock, x: Tensor) -> Branch | None:
    """What ``block`` adds to ``x``, or to maps of its size, if its training is a native call.

    Draws the random numbers of its stochastic depth.
    """
    known = type(block).forward is ResidualBlock.forward
    if torch.compiler.is_compiling() or not (known and block.training and may_pay(x)):
        return None
    branch = _trained_branch(list(_opened(block.layers())))
    if branch is None or not _is_plain_drop_path(block.drop_path) or not pays(x, branch):
        return None
    ones = x.new_ones(len(x), 1, 1, 1)
    scales = block.drop_path(ones)
    return branch if scales is ones else replace(branch, image_scales=scales)


def _is_plain_drop_path(drop_path: nn.Module) -> bool:
    return type(drop_path) in (DropPath, nn.Identity) and not has_hooks(drop_path)


def _opened(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers, with the parts of units in the place of units."""
    for layer in layers:
        if isinstance(layer, FusingSequential) and not has_hooks(layer):
            yield from layer
        else:
            yield layer


def _trained_branch(layers: Sequence[nn.Module]) -> Branch | None:
    """The branch that the layers are, if they train, are of known kinds and unobserved."""
    units: list[DepthwiseBN] = []
    inside: list[nn.Module] = []
    match layers:
        case [before, first, first_norm, activation, second, second_norm]:
            pass
        case [
            before,
            first,
            first_norm,
            activation,
            ReparamLargeKernelConv() as convolution,
            nn.ReLU() as relu,
            second,
            second_norm,
        ] if convolution.lkb_origin is not None:
            units = [convolution.lkb_origin]
            if convolution.small_conv is not None:
                units.append(convolution.small_conv)
            inside = [convolution, relu, *units]
        case _:
            return None
    pointwise: list[Any] = [first, second]
    norms: list[Any] = [before, first_norm, *(unit.bn for unit in units), second_norm]
    kernels = [unit.conv for unit in units]
    name = activation_name(activation)
    if (
        name is None
        or not all(map(_is_plain_pointwise, pointwise))
        or not all(map(_is_trained_norm, norms))
        or not all(map(_is_plain_depthwise, kernels))
        or any(map(has_hooks, (*pointwise, *norms, *kernels, activation, *inside)))
    ):
        return None
    return Branch(
        pointwise[0].weight,
        pointwise[1].weight,
        tuple(kernel.weight for kernel in kernels),
        tuple((norm.weight, norm.bias) for norm in norms),
        tuple(map(_statistics, norms)),
        name,
    )


def _is_trained_norm(norm: nn.Module) -> bool:
    return type(norm) is nn.BatchNorm2d and norm.training and norm.affine


def _is_plain_pointwise(conv: nn.Module) -> bool:
    return type(conv) is PointwiseConv2d and conv.bias is None


def _is_plain_depthwise(conv: nn.Module) -> bool:
    return (
        type(conv) is DepthwiseConv2d
        and conv.bias is None
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.padding == tuple(size // 2 for size in conv.kernel_size)
    )


def _statistics(norm: nn.BatchNorm2d) -> Statistics:
    momentum, batches = norm.momentum, norm.num_batches_tracked
    if momentum is None:  # their mean over all batches, if they are kept
        momentum = 1.0 if batches is None else 1.0 / (float(batches) + 1)
    return Statistics(norm.running_mean, norm.running_var, batches, momentum, norm.eps)

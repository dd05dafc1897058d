"""The arithmetic of merging: a sum of convolutions of one input is one convolution."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replknet.deploy.folding import double, is_convolution, is_plain_norm, norm_affine
from replknet.nn import DepthwiseConv2d


@dataclass(frozen=True, eq=False)
class Branch:
    """One term of a sum: a convolution, if any, then norms. Without either, an identity."""

    convolution: nn.Conv2d | None
    norms: tuple[nn.BatchNorm2d, ...]

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> Branch | None:
        """Branch that applies ``layers`` in turn; None if they are not of this kind."""
        convolution = None
        if layers and is_convolution(layers[0]):
            convolution, layers = layers[0], layers[1:]
            if not _is_padded_evenly(convolution):
                return None
        norms = tuple(layer for layer in layers if is_plain_norm(layer))
        return cls(convolution, norms) if len(norms) == len(layers) else None

    @property
    def is_identity(self) -> bool:
        """Whether the branch hands its input on unchanged."""
        return self.convolution is None and not self.norms

    def kernel(self, like: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Weight (out, in / groups, height, width), undilated, and bias (out,), in float64.

        A branch without a convolution takes its shape from ``like``.
        """
        if self.convolution is None:
            device = double(like.weight).device
            weight = torch.eye(like.weight.shape[1], dtype=torch.float64, device=device)
            weight = weight.repeat(like.groups, 1)[:, :, None, None]
            bias = weight.new_zeros(like.out_channels)
        else:
            weight = _undilated(self.convolution)
            old = self.convolution.bias
            bias = weight.new_zeros(weight.shape[0]) if old is None else double(old)
        for norm in self.norms:
            scale, shift = norm_affine(norm)
            weight, bias = weight * scale[:, None, None, None], bias * scale + shift
        return weight, bias


def mergeable(branches: Sequence[Branch]) -> list[Branch]:
    """The most branches that one convolution can compute; empty if that saves nothing.

    Convolutions must agree in channels, groups, stride and output size; a branch without a
    convolution needs one that keeps channels and size. A dense kernel is not merged with a
    depthwise one: the result would be right, and ruinously expensive.
    """
    kinds = defaultdict(list)
    for branch in branches:
        if branch.convolution is not None:
            kinds[_kind(branch.convolution)].append(branch)
    if not kinds:
        return []
    kind = max(kinds, key=lambda each: len(kinds[each]))
    chosen = kinds[kind]
    if kind.keeps_shape:
        chosen = chosen + [branch for branch in branches if branch.convolution is None]
    return chosen if sum(not branch.is_identity for branch in chosen) > 1 else []


def merge_branches(branches: Sequence[Branch]) -> nn.Conv2d:
    """Convolution with bias that computes the sum of ``mergeable`` branches, at least one.

    Its kernel is the smallest that covers every branch's. Depthwise class, dtype and device
    are those of the branch with the largest kernel.
    """
    convolutions = [branch.convolution for branch in branches if branch.convolution is not None]
    # As all outputs have the same size, the largest padding belongs to the largest kernel.
    height, width = (max(_reach(each)[axis] for each in convolutions) for axis in (0, 1))
    top, left = (max(_padding(each)[axis] for each in convolutions) for axis in (0, 1))
    largest = max(convolutions, key=lambda each: each.weight[0, 0].numel())
    total = double(largest.weight).new_zeros(*largest.weight.shape[:2], height, width)
    total_bias = total.new_zeros(largest.out_channels)
    for branch in branches:
        weight, bias = branch.kernel(largest)
        own_top, own_left = (0, 0) if branch.convolution is None else _padding(branch.convolution)
        above, before = top - own_top, left - own_left
        below, after = height - weight.shape[2] - above, width - weight.shape[3] - before
        total = total + F.pad(weight, (before, after, above, below))
        total_bias = total_bias + bias
    convolution_class = DepthwiseConv2d if isinstance(largest, DepthwiseConv2d) else nn.Conv2d
    merged = convolution_class(
        largest.in_channels,
        largest.out_channels,
        (height, width),
        stride=largest.stride,  # type: ignore[arg-type]
        padding=(top, left),
        groups=largest.groups,
        device="meta",  # no random initialisation
    )
    trained = any(each.weight.requires_grad for each in convolutions)
    merged.weight = nn.Parameter(total.to(largest.weight), requires_grad=trained)
    merged.bias = nn.Parameter(total_bias.to(largest.weight), requires_grad=trained)
    return merged.eval()


class _Kind(NamedTuple):
    """What convolutions must have in common to be merged."""

    in_channels: int
    out_channels: int
    groups: int
    stride: tuple[int, ...]
    growth: tuple[int, int]  # the output has (input + growth) // stride + 1 positions

    @property
    def keeps_shape(self) -> bool:
        same_channels = self.in_channels == self.out_channels
        return same_channels and self.stride == (1, 1) and self.growth == (-1, -1)


def _kind(convolution: nn.Conv2d) -> _Kind:
    (height, width), (top, left) = _reach(convolution), _padding(convolution)
    return _Kind(
        convolution.in_channels,
        convolution.out_channels,
        convolution.groups,
        convolution.stride,
        (2 * top - height, 2 * left - width),
    )


def _reach(convolution: nn.Conv2d) -> tuple[int, int]:
    """Height and width of the kernel, dilation included."""
    (height, width), (step_h, step_w) = convolution.kernel_size, convolution.dilation
    return step_h * (height - 1) + 1, step_w * (width - 1) + 1


def _is_padded_evenly(convolution: nn.Conv2d) -> bool:
    """Whether it pads with zeros, as many below and right as above and left."""
    odd = all(size % 2 == 1 for size in _reach(convolution))
    return convolution.padding_mode == "zeros" and (convolution.padding != "same" or odd)


def _padding(convolution: nn.Conv2d) -> tuple[int, int]:
    """Rows of zeros above and columns at the left."""
    if not isinstance(convolution.padding, str):
        top, left = convolution.padding
        return top, left
    height, width = _reach(convolution)
    return (height // 2, width // 2) if convolution.padding == "same" else (0, 0)


def _undilated(convolution: nn.Conv2d) -> Tensor:
    """Weight in float64, with the zeros that a dilation skips written out."""
    weight = double(convolution.weight)
    step_h, step_w = convolution.dilation
    dense = weight.new_zeros(*weight.shape[:2], *_reach(convolution))
    dense[:, :, ::step_h, ::step_w] = weight
    return dense

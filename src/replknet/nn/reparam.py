"""The large-kernel convolution with a parallel small kernel, and its merge into one kernel."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replknet.nn.depthwise import DepthwiseConv2d


class DepthwiseBN(nn.Sequential):
    """Depthwise convolution that keeps the input's size, without bias, then batch norm."""

    conv: DepthwiseConv2d
    bn: nn.BatchNorm2d | nn.Identity  # an identity once fused

    def __init__(self, channels: int, kernel_size: int) -> None:
        conv = same_depthwise(channels, kernel_size, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels)))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, in float64, of the equivalent convolution in eval mode."""
        if isinstance(self.bn, nn.Identity):
            return self.conv.weight.double(), cast("Tensor", self.conv.bias).double()
        mean, var = self.bn.running_mean, self.bn.running_var
        if mean is None or var is None:
            raise ValueError("a batch norm without running statistics cannot be folded")
        scale = self.bn.weight.double() / torch.sqrt(var.double() + self.bn.eps)
        bias = self.bn.bias.double() - mean.double() * scale
        return self.conv.weight.double() * scale.reshape(-1, 1, 1, 1), bias


class ReparamLargeKernelConv(nn.Module):
    """Depthwise KxK convolution trained beside a small one (paper, section 3, guideline 3).

    Training: ``BN(conv KxK) + BN(conv kxk)``, children ``lkb_origin`` and ``small_conv``.
    Merged: one KxK convolution with a bias, child ``lkb_reparam``. Input and output are
    (N, channels, H, W) of the same size; stride is 1. Children of the other form are None.
    """

    lkb_origin: DepthwiseBN
    small_conv: DepthwiseBN | None
    lkb_reparam: DepthwiseConv2d | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None = None,
        *,
        merged: bool = False,
    ) -> None:
        """Build one form.

        Raises:
            ValueError: ``kernel_size`` or ``small_kernel`` is even, or the small kernel is not
                smaller than the large one.
        """
        super().__init__()
        check_kernels(kernel_size, small_kernel)
        self.channels = channels
        self.kernel_size = kernel_size
        self.small_kernel = small_kernel
        self.register_module("lkb_origin", None if merged else DepthwiseBN(channels, kernel_size))
        self.small_conv = None
        if small_kernel is not None and not merged:
            self.small_conv = DepthwiseBN(channels, small_kernel)
        self.lkb_reparam = same_depthwise(channels, kernel_size, bias=True) if merged else None

    def forward(self, x: Tensor) -> Tensor:
        if self.lkb_reparam is not None:
            return self.lkb_reparam(x)
        out = self.lkb_origin(x)
        if self.small_conv is not None:
            out = out + self.small_conv(x)
        return out

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge in place: the protocol of ``timm.utils.reparameterize_model``. Idempotent."""
        if self.lkb_reparam is not None:
            return
        weight, bias = self.lkb_origin.folded()
        if self.small_conv is not None:
            small_weight, small_bias = self.small_conv.folded()
            border = (weight.shape[-1] - small_weight.shape[-1]) // 2
            weight = weight + F.pad(small_weight, [border] * 4)
            bias = bias + small_bias
        merged = same_depthwise(self.channels, self.kernel_size, bias=True)
        merged.to(self.lkb_origin.conv.weight).load_state_dict({"weight": weight, "bias": bias})
        self.lkb_reparam = merged.train(self.training)
        self.register_module("lkb_origin", None)
        self.small_conv = None

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, small_kernel={self.small_kernel}"


def check_kernels(kernel_size: int, small_kernel: int | None) -> None:
    """Refuse kernels that have no common centre, or a small one that is not smaller."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel size must be odd, so that the output keeps the size of the input, got "
            f"{kernel_size}; use {max(kernel_size - 1, 1)} or {max(kernel_size + 1, 3)}"
        )
    if small_kernel is None:
        return
    if small_kernel < 1 or small_kernel % 2 == 0:
        raise ValueError(
            f"small_kernel must be odd, so that both kernels share a centre, got {small_kernel}; "
            "use 3 or 5, or None for no small kernel"
        )
    if small_kernel >= kernel_size:
        raise ValueError(
            f"small_kernel ({small_kernel}) must be smaller than the large kernel "
            f"({kernel_size}); use small_kernel=None for kernels of this size"
        )


def same_depthwise(channels: int, kernel_size: int, *, bias: bool) -> DepthwiseConv2d:
    """Depthwise convolution, stride 1, that keeps the input's size."""
    return DepthwiseConv2d(
        channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias
    )

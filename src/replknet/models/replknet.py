"""RepLKNet: blocks, stage, network (Ding et al., CVPR 2022, arXiv 2203.06717).

Module names are those of the published checkpoints, so their files load without renaming.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, cast, get_args

from timm.layers import DropPath, create_classifier
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from replknet.models.recompute import checkpoint_block
from replknet.nn import DepthwiseConv2d, PointwiseConv2d, ReparamLargeKernelConv
from replknet.nn.norm import FusingSequential
from replknet.nn.reparam import check_kernels
from replknet.nn.residual import ResidualBlock, run_blocks

Form = Literal["training", "merged", "deep_fused", "fused"]
"""How much of the network has been folded away.

training: as trained. merged: each pair of large and small kernel is one convolution.
deep_fused: every conv-BN unit is one convolution too, the BNs before a block stay (the form of
the authors' code). fused: those are folded into the next convolution as well.
"""

BLOCKS_PER_DECAY_GROUP = 4


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    depthwise: bool = False,
    relu: bool = False,
    form: Form = "training",
) -> FusingSequential:
    """Convolution, batch norm and optional ReLU; a convolution with bias in the fused forms."""
    fused = form in ("deep_fused", "fused")
    unit: OrderedDict[str, nn.Module] = OrderedDict()
    if kernel_size == 1:
        unit["conv"] = PointwiseConv2d(in_channels, out_channels, bias=fused)
    else:
        conv_class = DepthwiseConv2d if depthwise else nn.Conv2d
        unit["conv"] = conv_class(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=in_channels if depthwise else 1,
            bias=fused,
        )
    if not fused:
        unit["bn"] = nn.BatchNorm2d(out_channels)
    if relu:
        unit["nonlinear"] = nn.ReLU(inplace=True)
    return FusingSequential(unit)


def pre_norm(channels: int, form: Form) -> nn.Module:
    """Batch norm in front of a 1x1 convolution, which absorbs it in the fused form."""
    return nn.Identity() if form == "fused" else nn.BatchNorm2d(channels)


class RepLKBlock(ResidualBlock):
    """``x + drop_path(pw2(relu(LK(relu(pw1(BN(x)))))))`` on (N, channels, H, W)."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None,
        dw_ratio: float,
        drop_path: float,
        form: Form = "training",
    ) -> None:
        super().__init__()
        width = int(channels * dw_ratio)
        self.prelkb_bn = pre_norm(channels, form)
        self.pw1 = conv_bn(channels, width, 1, relu=True, form=form)
        self.large_kernel = ReparamLargeKernelConv(
            width, kernel_size, small_kernel, merged=form != "training"
        )
        self.lk_nonlinear = nn.ReLU(inplace=True)
        self.pw2 = conv_bn(width, channels, 1, form=form)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def layers(self) -> Sequence[nn.Module]:
        return self.prelkb_bn, self.pw1, self.large_kernel, self.lk_nonlinear, self.pw2


class ConvFFN(ResidualBlock):
    """``x + drop_path(pw2(gelu(pw1(BN(x)))))`` on (N, channels, H, W); exact GELU."""

    def __init__(
        self, channels: int, ffn_ratio: float, drop_path: float, form: Form = "training"
    ) -> None:
        super().__init__()
        width = int(channels * ffn_ratio)
        self.preffn_bn = pre_norm(channels, form)
        self.pw1 = conv_bn(channels, width, 1, form=form)
        self.nonlinear = nn.GELU()
        self.pw2 = conv_bn(width, channels, 1, form=form)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def layers(self) -> Sequence[nn.Module]:
        return self.preffn_bn, self.pw1, self.nonlinear, self.pw2


class RepLKNetStage(nn.Module):
    """Pairs of RepLKBlock and ConvFFN, one drop-path rate for each pair.

    ``norm`` is applied to the features handed out for dense prediction, never on the way to the
    next stage.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None,
        dw_ratio: float,
        ffn_ratio: float,
        drop_path_rates: Sequence[float],
        norm_features: bool = False,
        form: Form = "training",
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList()
        for rate in drop_path_rates:
            self.blocks.append(
                RepLKBlock(channels, kernel_size, small_kernel, dw_ratio, rate, form)
            )
            self.blocks.append(ConvFFN(channels, ffn_ratio, rate, form))
        self.norm = nn.BatchNorm2d(channels) if norm_features else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and self.training):
            return run_blocks(self.blocks, x)
        for block in self.blocks:
            x = checkpoint_block(block, x)
        return x


class RepLKNet(nn.Module):
    """RepLKNet classifier and backbone; input (N, in_chans, H, W), output (N, num_classes).

    Any number of stages; stage ``i`` works at stride ``stem_stride * 2**i``. Weights have
    PyTorch's default initialisation.
    """

    def __init__(
        self,
        kernels: Sequence[int] = (31, 29, 27, 13),
        layers: Sequence[int] = (2, 2, 18, 2),
        channels: Sequence[int] = (128, 256, 512, 1024),
        *,
        small_kernel: int | None = 5,
        dw_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
        stem_stride: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_intermediate_features: bool = False,
        frozen_stages: int = -1,
        form: Form = "training",
    ) -> None:
        """Build the network.

        Args:
            kernels: Large kernel of each stage, odd.
            layers: Pairs of RepLKBlock and ConvFFN of each stage.
            channels: Channels of each stage.
            small_kernel: Kernel trained in parallel with each large one; None for none.
            dw_ratio: Channels of the large convolution relative to its stage's.
            ffn_ratio: Hidden channels of the ConvFFN relative to its stage's.
            stem_stride: 4 as published; 2 or 1 for small images.
            in_chans: Channels of the input.
            num_classes: Outputs of the classifier; 0 for pooled features.
            global_pool: Pooling before the classifier, in timm's names.
            drop_rate: Dropout before the classifier.
            drop_path_rate: Stochastic depth of the last pair of blocks; grows linearly from 0.
            norm_intermediate_features: Normalise each stage's features for dense prediction.
            frozen_stages: -1 trains everything; k >= 0 freezes the stem and the first k stages,
                with the transitions between them, and keeps their batch norms in eval mode.
            form: Training network, or the structure of a folded one (see ``Form``).

        Raises:
            ValueError: An argument is out of range; the message names the values allowed.
        """
        super().__init__()
        check_arguments(kernels, layers, channels, small_kernel, stem_stride, frozen_stages, form)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = channels[-1]
        self.frozen_stages = frozen_stages
        self.feature_info = [
            {"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            for i, width in enumerate(channels)
        ]

        width = channels[0]
        # Small images keep their resolution through the first three layers.
        first, last = {4: (2, 2), 2: (1, 2), 1: (1, 1)}[stem_stride]
        self.stem = nn.Sequential(
            conv_bn(in_chans, width, 3, stride=first, relu=True, form=form),
            conv_bn(width, width, 3, depthwise=True, relu=True, form=form),
            conv_bn(width, width, 1, relu=True, form=form),
            conv_bn(width, width, 3, stride=last, depthwise=True, relu=True, form=form),
        )
        rates = drop_path_rates(drop_path_rate, layers)
        self.stages = nn.ModuleList(
            RepLKNetStage(
                channels[i],
                kernels[i],
                small_kernel,
                dw_ratio,
                ffn_ratio,
                rates[i],
                norm_features=norm_intermediate_features,
                form=form,
            )
            for i in range(len(layers))
        )
        self.transitions = nn.ModuleList(
            nn.Sequential(
                conv_bn(previous, following, 1, relu=True, form=form),
                conv_bn(following, following, 3, stride=2, depthwise=True, relu=True, form=form),
            )
            for previous, following in pairwise(channels)
        )
        # Average pooling is linear, so the classifier can absorb the norm in front of it.
        absorbed = form == "fused" and num_classes > 0 and global_pool == "avg"
        self.norm = nn.Identity() if absorbed else nn.BatchNorm2d(channels[-1])
        self.global_pool, self.head = create_classifier(channels[-1], num_classes, global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self._freeze()

    def _stages(self) -> list[RepLKNetStage]:
        return cast("list[RepLKNetStage]", list(self.stages))

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        stages, transitions = self.stages, self.transitions
        return [
            self.stem,
            *stages[: self.frozen_stages],
            *transitions[: max(self.frozen_stages - 1, 0)],
        ]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)
            module.eval()

    def train(self, mode: bool = True) -> RepLKNet:
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Parameter name -> depth, for layer-wise learning-rate decay.

        The stem is 0. Each stage is cut into groups of four blocks (one group when ``coarse``);
        a transition and a stage's norm belong to the last group before them. Final norm and head
        are the last group. 14 groups for the 31B, as in the authors' recipes.
        """
        sizes = [
            1 if coarse else -(-len(stage.blocks) // BLOCKS_PER_DECAY_GROUP)
            for stage in self._stages()
        ]
        starts = [1 + sum(sizes[:i]) for i in range(len(sizes) + 1)]

        def depth(name: str) -> int:
            part, *rest = name.split(".")
            if part == "stem":
                return 0
            if part == "stages" and rest[1] == "blocks" and not coarse:
                return starts[int(rest[0])] + int(rest[2]) // BLOCKS_PER_DECAY_GROUP
            if part in ("stages", "transitions"):
                return starts[int(rest[0]) + 1] - 1
            return starts[-1]

        return depth

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass; no effect on batch norms."""
        for stage in self._stages():
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """No parameter beyond those of one dimension, which optimizers exempt by themselves."""
        return set()

    def get_classifier(self) -> nn.Module:
        """Final linear layer; Identity when ``num_classes`` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New, untrained classifier; ``global_pool`` None keeps the pooling."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        device, dtype = next((p.device, p.dtype) for p in self.parameters())
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool)
        self.head.to(device=device, dtype=dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features and the outputs of the chosen stages, before their transitions.

        Args:
            x: (N, in_chans, H, W).
            indices: Stages to return: the last n, those of a sequence, or all.
            norm: Apply the final norm to the last stage's features (a stage's own norm, of
                ``norm_intermediate_features``, is always applied).
            stop_early: Do not compute stages after the last one asked for.
            output_fmt: Only "NCHW".
            intermediates_only: Return the list alone.
        """
        if output_fmt != "NCHW":
            raise NotImplementedError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, deepest = feature_take_indices(len(self.stages), indices)
        count = deepest + 1 if stop_early else len(self.stages)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self._stages()[:count]):
            x = self._forward_stage(i, x)
            if i in taken:
                final = norm and i == len(self.stages) - 1
                intermediates.append(self.norm(x) if final else stage.norm(x))
        if intermediates_only:
            return intermediates
        return (self.norm(x) if count == len(self.stages) else x), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what ``forward_intermediates(indices=...)`` does not need; returns the indices."""
        taken, deepest = feature_take_indices(len(self.stages), indices)
        truncated = deepest < len(self.stages) - 1
        self.stages = self.stages[: deepest + 1]
        self.transitions = self.transitions[:deepest]
        if truncated:
            self.num_features = self.head_hidden_size = self.feature_info[deepest]["num_chs"]
        if truncated or prune_norm:
            self.norm = nn.Identity()
        if truncated or prune_head:
            self.reset_classifier(0, "")
        return taken

    def _forward_stage(self, index: int, x: Tensor) -> Tensor:
        if index > 0:
            x = self.transitions[index - 1](x)
        return self.stages[index](x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Last feature map after the final norm, (N, C, H / stride, W / stride)."""
        x = self.stem(x)
        for i in range(len(self.stages)):
            x = self._forward_stage(i, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify; ``pre_logits`` returns what the classifier would see."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def check_arguments(
    kernels: Sequence[int],
    layers: Sequence[int],
    channels: Sequence[int],
    small_kernel: int | None,
    stem_stride: int,
    frozen_stages: int,
    form: str,
) -> None:
    """Refuse what cannot be built, with the values allowed."""
    if not layers or not len(kernels) == len(layers) == len(channels):
        raise ValueError(
            "kernels, layers and channels need one entry for each stage, got "
            f"{tuple(kernels)}, {tuple(layers)} and {tuple(channels)}"
        )
    for kernel in kernels:
        check_kernels(kernel, small_kernel)
    if stem_stride not in (1, 2, 4):
        raise ValueError(f"stem_stride must be 1, 2 or 4, got {stem_stride}")
    if not -1 <= frozen_stages <= len(layers):
        raise ValueError(
            f"frozen_stages must be between -1 (train everything) and {len(layers)} (freeze all "
            f"stages), got {frozen_stages}"
        )
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")


def drop_path_rates(rate: float, layers: Sequence[int]) -> list[list[float]]:
    """Rate of each pair of blocks, by stage: linear from 0 to ``rate`` over the whole network."""
    # Plain floats: a tensor could not be read when the model is built on the meta device.
    last = max(sum(layers) - 1, 1)
    starts = [sum(layers[:i]) for i in range(len(layers))]
    return [
        [rate * (start + j) / last for j in range(count)]
        for start, count in zip(starts, layers, strict=True)
    ]

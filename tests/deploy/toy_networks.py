"""Small networks with parallel branches and norms in every position, and random statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and affine parameters, three tenths of the gammas negative; eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is None:
                continue
            module.running_mean.copy_(uniform(module.running_mean, -0.3, 0.3))
            module.running_var.copy_(uniform(module.running_var, 0.5, 2.0))
            if module.weight is not None:
                sign = torch.sign(uniform(module.weight, -0.3, 0.7))
                module.weight.copy_(uniform(module.weight, 0.5, 1.5) * sign)
                module.bias.copy_(uniform(module.bias, -0.3, 0.3))
    return model.eval()


def count(model: nn.Module, *kinds: type[nn.Module]) -> int:
    """Modules of the given classes."""
    return sum(isinstance(module, kinds) for module in model.modules())


def conv_bn(inputs: int, outputs: int, kernel, padding, **options) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class RepVGGBlock(nn.Module):
    """3x3, 1x1 and identity branches, the last a bare norm; an activation after the sum."""

    def __init__(self, channels: int, outputs: int | None = None, stride: int = 1, groups: int = 1):
        super().__init__()
        outputs = outputs or channels
        self.dense = conv_bn(channels, outputs, 3, 1, stride=stride, groups=groups)
        self.point = conv_bn(channels, outputs, 1, 0, stride=stride, groups=groups)
        self.identity = nn.BatchNorm2d(channels) if (channels, stride) == (outputs, 1) else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity = 0 if self.identity is None else self.identity(x)
        return self.act(self.dense(x) + self.point(x) + identity)


class RectangularBlock(nn.Module):
    """As in SLaK: a tall, a wide and a small depthwise kernel."""

    def __init__(self, channels: int):
        super().__init__()
        self.tall = conv_bn(channels, channels, (11, 3), (5, 1), groups=channels)
        self.wide = conv_bn(channels, channels, (3, 11), (1, 5), groups=channels)
        self.small = conv_bn(channels, channels, 3, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.tall(x)
        out += self.wide(x)
        return out + self.small(x)


class DilatedBlock(nn.Module):
    """As in UniRepLKNet: a large kernel beside dilated small ones; a norm after the sum."""

    def __init__(self, channels: int):
        super().__init__()
        self.large = nn.Conv2d(channels, channels, 9, padding=4, groups=channels, bias=False)
        self.large_bn = nn.BatchNorm2d(channels)
        for kernel, dilation in self.SIZES:
            padding = dilation * (kernel - 1) // 2
            branch = conv_bn(
                channels, channels, kernel, padding, dilation=dilation, groups=channels
            )
            self.add_module(f"branch_{kernel}_{dilation}", branch)
        self.norm = nn.BatchNorm2d(channels)

    SIZES = ((5, 1), (3, 2), (3, 4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.large_bn(self.large(x))
        for kernel, dilation in self.SIZES:
            out = out + getattr(self, f"branch_{kernel}_{dilation}")(x)
        return self.norm(out)


class ListBlock(nn.Module):
    """Branches in a list, with biases and without norms, summed by Python's ``sum``."""

    def __init__(self, channels: int):
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.Conv2d(channels, channels, size, padding="same") for size in (1, 5, 3)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


class ShortcutBlock(nn.Module):
    """Two branches and the input itself."""

    def __init__(self, channels: int):
        super().__init__()
        self.one = conv_bn(channels, channels, 3, 1)
        self.two = conv_bn(channels, channels, 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.one(x)) + self.two(x)


class EvenBlock(nn.Module):
    """Even kernels, strided and without padding, of different groups of channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.one = nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1, groups=2)
        self.two = nn.Conv2d(channels, 2 * channels, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).add(self.two(x))


class Network(nn.Module):
    """Stem, body, norm, average pooling, linear head."""

    def __init__(self, *body: nn.Module, width: int = 8):
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 1)
        self.body = nn.Sequential(*body)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.body(self.stem(x).relu()))
        return self.head(self.pool(x).flatten(1))


def networks() -> dict[str, nn.Module]:
    """One network of every kind of block."""
    torch.manual_seed(0)
    return {
        "identity norm": Network(RepVGGBlock(8), RepVGGBlock(8)),
        "strided and grouped": Network(RepVGGBlock(8, 16, stride=2, groups=4), width=16),
        "rectangular": Network(RectangularBlock(8), nn.ReLU(), RectangularBlock(8)),
        "dilated": Network(DilatedBlock(8)),
        "list without norms": Network(ListBlock(8)),
        "shortcut": Network(ShortcutBlock(8)),
        "even": Network(EvenBlock(8), width=16),
        "nested": Network(nn.Sequential(nn.ModuleDict({"a": RepVGGBlock(8)})["a"], ListBlock(8))),
    }

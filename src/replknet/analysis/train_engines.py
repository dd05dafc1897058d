"""The engines that ``replknet benchmark train`` compares: who computes a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from replknet.deploy.plain import on_pytorch
from replknet.engine.setup import use_channels_last
from replknet.nn import accelerate


@dataclass(frozen=True)
class TrainEngine:
    """Makes a copy of a network, in training mode, and the images as that copy wants them."""

    name: str
    prepare: Callable[[nn.Module, Tensor], tuple[nn.Module, Tensor]]
    missing: str = ""


def train_engines() -> dict[str, TrainEngine]:
    """Every engine by name; those not called replknet compute on PyTorch's own layers."""
    engines = [
        TrainEngine("pytorch nchw", lambda model, image: (_stock(model), image)),
        TrainEngine(
            "pytorch channels_last", lambda model, image: _channels_last(_stock(model), image)
        ),
        TrainEngine(
            "torch.compile",
            lambda model, image: _compiled(*_channels_last(_stock(model), image)),
        ),
        TrainEngine(
            "replknet",
            lambda model, image: _channels_last(accelerate(model).train(), image),
        ),
        TrainEngine(
            "replknet compiled",
            lambda model, image: _compiled(*_channels_last(accelerate(model).train(), image)),
        ),
    ]
    return {engine.name: engine for engine in engines}


def _stock(model: nn.Module) -> nn.Module:
    return on_pytorch(model).train()


def _channels_last(network: nn.Module, image: Tensor) -> tuple[nn.Module, Tensor]:
    use_channels_last(network)
    return network, image.contiguous(memory_format=torch.channels_last)


def _compiled(network: nn.Module, image: Tensor) -> tuple[nn.Module, Tensor]:
    return cast(nn.Module, torch.compile(network, dynamic=False)), image

"""Small networks and their weights in every layout found in the wild."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from replknet.models import RepLKNet

StateDict = dict[str, Tensor]


def small(**kwargs) -> RepLKNet:
    arguments = {
        "kernels": (13, 7),
        "layers": (1, 2),
        "channels": (8, 16),
        "stem_stride": 2,
        "num_classes": 5,
    }
    return RepLKNet(**{**arguments, **kwargs})


def randomize(model: nn.Module) -> nn.Module:
    """Batch norms as if trained, with negative scales too."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3.0)
    return model


def prefixed(prefix: str, state: StateDict) -> StateDict:
    return {prefix + name: value for name, value in state.items()}


def mmpretrain(state: StateDict) -> StateDict:
    renamed = {}
    for name, value in state.items():
        if name.startswith("head."):
            renamed[name.replace("head.", "head.fc.")] = value
        elif name.startswith("norm."):
            renamed["backbone." + name.replace("norm.", "stages.1.norm.")] = value
        else:
            renamed["backbone." + name] = value
    return renamed


def without_classifier(state: StateDict) -> StateDict:
    return {n: v for n, v in state.items() if not n.startswith(("head.", "norm."))}


HEADS = {"decode_head.conv_seg.weight": torch.zeros(3, 4, 1, 1), "neck.lateral.bias": torch.ones(2)}
OTHER = torch.full((1,), 7.0)

LAYOUTS: dict[str, Callable[[StateDict], object]] = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s},
    "state_dict": lambda s: {"state_dict": s},
    "ddp": lambda s: prefixed("module.", s),
    "compiled ddp": lambda s: {"state_dict": prefixed("module._orig_mod.", s)},
    "trainer without ema": lambda s: {
        "model": s,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": "best",
        "scaler": {},
        "args": argparse.Namespace(lr=0.1, data_path="/data"),
    },
    "trainer": lambda s: {
        "model": {name: torch.zeros_like(value) for name, value in s.items()},
        "model_ema": s,
        "optimizer": {},
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
    },
    "22k": lambda s: {n.replace("head.", "head.cls_22k."): v for n, v in s.items()},
    "mmpretrain": lambda s: {"meta": {"epoch": 1}, "state_dict": mmpretrain(s)},
}

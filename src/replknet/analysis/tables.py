"""The paper's result tables as data, and this project's own figures beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from replknet.analysis.flops import CLASSIFICATION, count_flops
from replknet.analysis.timing import interleave
from replknet.deploy import optimize
from replknet.models import create_model, list_models


@dataclass(frozen=True)
class ClassificationRow:
    """A row of table 6 as printed; None where the paper prints a dash.

    ``model`` builds the network; ``baseline`` is the model of the row that this one is compared
    with. ``top1`` in percent, ``parameters`` in millions, ``flops`` in billions of multiply-adds,
    ``throughput`` in images per second at batch 64 in float32 on an RTX 2080 Ti.
    """

    network: str
    model: str
    size: int
    pretraining: str
    top1: float
    parameters: float | None = None
    flops: float | None = None
    throughput: float | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class ClassificationFigures:
    """A row of table 6 with this project's figures; throughputs are None unless measured.

    ``parameters`` and ``flops`` are exact counts; ``paper_ratio`` and ``ratio`` are throughputs
    relative to the baseline's, in the paper and on this machine.
    """

    paper: ClassificationRow
    parameters: int
    flops: int
    paper_ratio: float | None
    throughput: float | None = None
    ratio: float | None = None


_1K, _22K, _EXTRA = "ImageNet-1K", "ImageNet-22K", "MegData-73M"
_SWIN_B_224 = "swin_base_patch4_window7_224"
_SWIN_B_384 = "swin_base_patch4_window12_384"
_SWIN_L_384 = "swin_large_patch4_window12_384"
_B, _L, _XL = "replknet_31b", "replknet_31l", "replknet_xl"

TABLE_6 = (
    ClassificationRow("RepLKNet-31B", _B, 224, _1K, 83.5, 79, 15.3, 295.5, _SWIN_B_224),
    ClassificationRow("Swin-B", _SWIN_B_224, 224, _1K, 83.5, 88, 15.4, 226.2),
    ClassificationRow("RepLKNet-31B", _B, 384, _1K, 84.8, 79, 45.1, 97.0, _SWIN_B_384),
    ClassificationRow("Swin-B", _SWIN_B_384, 384, _1K, 84.5, 88, 47.0, 67.9),
    ClassificationRow("RepLKNet-31B", _B, 224, _22K, 85.2, baseline=_SWIN_B_224),
    ClassificationRow("Swin-B", _SWIN_B_224, 224, _22K, 85.2),
    ClassificationRow("RepLKNet-31B", _B, 384, _22K, 86.0, baseline=_SWIN_B_384),
    ClassificationRow("Swin-B", _SWIN_B_384, 384, _22K, 86.4),
    ClassificationRow("RepLKNet-31L", _L, 384, _22K, 86.6, 172, 96.0, 50.2, _SWIN_L_384),
    ClassificationRow("Swin-L", _SWIN_L_384, 384, _22K, 87.3, 197, 103.9, 36.2),
    ClassificationRow("RepLKNet-XL", _XL, 320, _EXTRA, 87.8, 335, 128.7, 39.1),
)
"""ImageNet-1K classification (paper, table 6)."""


def count_table_6() -> list[ClassificationFigures]:
    """Every row of table 6 with the parameters and FLOPs of the network that this project builds.

    A RepLKNet is counted merged, with its conv-BN units fused.
    """
    counts = {key: _count(*key) for key in dict.fromkeys(map(_network, TABLE_6))}
    return [
        ClassificationFigures(row, *counts[_network(row)], paper_ratio=_paper_ratio(row))
        for row in TABLE_6
    ]


def measure_table_6(
    figures: Sequence[ClassificationFigures],
    batch: int,
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[ClassificationFigures]:
    """Add the throughput on this machine: medians of rounds in which compared networks take turns.

    RepLKNet runs as ``replknet.optimize`` makes it, a baseline as timm does.
    """
    measured: dict[tuple[str, int], float] = {}
    for row in (each.paper for each in figures):
        compared = (name for name in (row.model, row.baseline) if name is not None)
        models = [name for name in compared if (name, row.size) not in measured]
        if not models:
            continue
        progress(f"{' and '.join(models)} at {row.size}")
        images = torch.randn(batch, 3, row.size, row.size)
        calls = {name: partial(_for_inference(name), images) for name in models}
        with torch.inference_mode():
            times = interleave(calls, rounds)
        for name, seconds in times.items():
            measured[name, row.size] = batch / median(seconds)
    return [_with_speed(each, measured) for each in figures]


def _with_speed(
    figures: ClassificationFigures, measured: dict[tuple[str, int], float]
) -> ClassificationFigures:
    row = figures.paper
    speed = measured[_network(row)]
    ratio = None if row.baseline is None else speed / measured[row.baseline, row.size]
    return replace(figures, throughput=speed, ratio=ratio)


def _network(row: ClassificationRow) -> tuple[str, int]:
    return row.model, row.size


def _count(model: str, size: int) -> tuple[int, int]:
    options: dict[str, Any] = {"form": CLASSIFICATION.form} if model in list_models() else {}
    with torch.device("meta"):
        network = create_model(model, **options)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters, count_flops(network, (1, 3, size, size))


def _paper_ratio(row: ClassificationRow) -> float | None:
    wanted = (row.baseline, row.size, row.pretraining)
    for other in TABLE_6:
        found = (other.model, other.size, other.pretraining) == wanted
        if found and row.throughput is not None and other.throughput is not None:
            return row.throughput / other.throughput
    return None


def _for_inference(model: str) -> nn.Module:
    network = create_model(model).eval()
    return optimize(network) if model in list_models() else network

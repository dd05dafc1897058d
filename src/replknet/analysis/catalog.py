"""What variants there are, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from timm.models import PretrainedCfg

from replknet.analysis.flops import CLASSIFICATION, count_flops
from replknet.models import create_model
from replknet.models.variants import PUBLISHED_FILES, default_cfgs


@dataclass(frozen=True)
class Variant:
    """A name that ``create_model`` takes; with a tag where there are several uses.

    ``source`` is "published" (with weights, in ``file``, to be brought by the user), "paper" (a
    network of the paper without published weights) or "ours". ``input_size`` is (channels,
    height, width). ``parameters`` are those of the network in training; ``deployed_parameters``
    and ``flops`` (multiply-adds, as in table 6) are those of the network merged,
    with norms fused (form "deep_fused").
    """

    name: str
    source: Literal["published", "paper", "ours"]
    input_size: tuple[int, int, int]
    classes: int
    parameters: int
    deployed_parameters: int
    flops: int
    license: str
    paper: str | tuple[str, ...] | None
    page: str | None
    file: str | None


def list_variants() -> list[Variant]:
    """Every variant, once for each of its published uses, in the order of the family."""
    return [
        _describe(name, tag, config)
        for name, uses in default_cfgs.items()
        for tag, config in uses.cfgs.items()
    ]


def _describe(name: str, tag: str, config: PretrainedCfg) -> Variant:
    file = _FILES.get(f"{name}.{tag}")
    with torch.device("meta"):
        trained = create_model(name, num_classes=config.num_classes)
        merged = create_model(name, num_classes=config.num_classes, form=CLASSIFICATION.form)
    return Variant(
        name=name if file is None else f"{name}.{tag}",
        source="published" if file else "paper" if config.paper_ids else "ours",
        input_size=config.input_size,
        classes=config.num_classes,
        parameters=sum(parameter.numel() for parameter in trained.parameters()),
        deployed_parameters=sum(parameter.numel() for parameter in merged.parameters()),
        flops=count_flops(merged, (1, *config.input_size)),
        license=config.license or "unknown",
        paper=config.paper_ids,
        page=config.origin_url,
        file=None if file is None else f"{file}.pth",
    )


_FILES = {name: file for file, name in PUBLISHED_FILES.items()}

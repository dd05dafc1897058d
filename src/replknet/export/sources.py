"""What a checkpoint is exported as: its network, its input, and what its outputs mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from timm.data import resolve_model_data_config
from timm.models import FeatureInfo
from torch import nn

from replknet.export.verification import LOGITS
from replknet.models import create_model, read_checkpoint
from replknet.tasks.classification import Preprocessing
from replknet.tasks.classification.classifier import read_classifier


@dataclass(frozen=True)
class Source:
    """A network to export, in the form in which it is stored.

    Attributes:
        outputs: Names of the tensors that it returns.
        metadata: Of the exported file.
    """

    network: nn.Module
    preprocessing: Preprocessing
    outputs: tuple[str, ...]
    metadata: dict[str, Any]


def read_classification(path: Path, model: str | None, input_size: int | None) -> Source:
    """The classifier in a checkpoint; arguments and errors are those of ``read_classifier``."""
    classifier = read_classifier(path, model=model, input_size=input_size)
    usage = {
        "task": "classification",
        "preprocessing": classifier.preprocessing.to_dict(),
        "class_names": list(classifier.class_names),
    }
    network: Any = classifier.model
    described = _description(network, num_classes=network.num_classes)
    metadata = {**described, **read_checkpoint(path).metadata, **usage}
    return Source(network, classifier.preprocessing, (LOGITS,), metadata)


def read_backbone(path: Path, model: str | None, input_size: int | None) -> Source:
    """The network in a checkpoint up to its head, with the features of every stage as outputs.

    Metadata lists the outputs with their channels and reductions (input pixels a position).
    ``input_size`` is the size at which the file is verified, which takes any.
    """
    network: Any = create_model(model, checkpoint=path, features_only=True).eval()
    preprocessing = Preprocessing.from_dict(resolve_model_data_config(network))
    if input_size is not None:
        preprocessing = preprocessing.resized(input_size)
    info: FeatureInfo = network.feature_info
    names = tuple(f"features_{index}" for index in info.out_indices)
    outputs = [
        {"name": name, "channels": channels, "reduction": reduction}
        for name, channels, reduction in zip(
            names, cast("list[int]", info.channels()), info.reduction(), strict=True
        )
    ]
    stored = dict(read_checkpoint(path).metadata)
    stored.pop("class_names", None)
    stored.pop("metrics", None)
    usage = {
        "task": "backbone",
        "preprocessing": preprocessing.to_dict(),
        "outputs": outputs,
    }
    return Source(network, preprocessing, names, {**_description(network), **stored, **usage})


SOURCES: dict[str, Callable[[Path, str | None, int | None], Source]] = {
    "classification": read_classification,
    "backbone": read_backbone,
}
"""Readers of checkpoints, by the task of what is exported."""


def _description(network: Any, **kwargs: Any) -> dict[str, Any]:
    """What a checkpoint without metadata would say of its model."""
    config = network.pretrained_cfg
    name = ".".join(part for part in (config["architecture"], config.get("tag")) if part)
    return {"model": {"name": name, "kwargs": kwargs}}

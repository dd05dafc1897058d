"""A trained classifier with all it needs to be used, from one file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from timm.data import resolve_model_data_config
from torch import nn

from replknet.deploy import fuse, optimize, reparameterize
from replknet.models import create_model, read_checkpoint
from replknet.tasks.classification.class_names import names_by_count
from replknet.tasks.classification.preprocessing import Preprocessing


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode, what to feed it, and what its outputs mean."""

    model: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    device: torch.device


def load_classifier(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    input_size: int | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Load a classifier for inference: optimized on the CPU, merged and folded elsewhere.

    Arguments and errors are those of ``read_classifier``.
    """
    stored = read_classifier(checkpoint, model=model, input_size=input_size)
    device = torch.device(device)
    prepare = optimize if device.type == "cpu" else lambda model: fuse(reparameterize(model))
    return replace(stored, model=prepare(stored.model).to(device), device=device)


def read_classifier(
    checkpoint: str | Path, *, model: str | None = None, input_size: int | None = None
) -> Classifier:
    """Read a classifier in the form in which it is stored, on the CPU.

    Our own files say everything. Of a published one, ``model`` names the variant with its tag
    ("replknet_31b.in1k_384"); left out, it follows from the file's name, or else from the shapes
    of its weights with the preprocessing of 224 pixels. Its classes are called by ImageNet's names
    where their number fits. ``input_size`` is for another size than the model's own.

    Raises ``ValueError`` for a file of another task and what ``create_model`` raises.
    """
    metadata = read_checkpoint(checkpoint).metadata
    if (task := metadata.get("task", "classification")) != "classification":
        raise ValueError(f"{checkpoint} was trained for {task}, not for classification")
    network = create_model(model, checkpoint=checkpoint).eval()
    preprocessing = Preprocessing.from_dict(resolve_model_data_config(network))
    if input_size is not None:
        preprocessing = preprocessing.resized(input_size)
    names = tuple(metadata.get("class_names") or names_by_count(cast(int, network.num_classes)))
    return Classifier(network, preprocessing, names, torch.device("cpu"))

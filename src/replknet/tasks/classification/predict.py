"""Predictions for any number of image files, in their order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from replknet.tasks.classification.classifier import Classifier
from replknet.tasks.classification.decoding import CorruptImageError, decode_image
from replknet.tasks.classification.folders import is_hidden


@dataclass(frozen=True)
class Label:
    """A class and how probable the model finds it."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first; or why it could not be read."""

    source: str
    labels: tuple[Label, ...] = ()
    error: str | None = None


def find_images(sources: Iterable[str], stdin: TextIO) -> Iterator[str]:
    """Paths of images: files, all images under folders, glob patterns, and ``-`` for a list.

    Hidden files under folders are passed over. ``-`` reads one path a line from ``stdin``. What
    cannot be found is passed on as it is, to be reported where it would be read.
    """
    for source in sources:
        if source == "-":
            yield from find_images((line.strip() for line in stdin if line.strip()), stdin)
        elif os.path.isdir(source):
            yield from _images_under(Path(source)) or [source]
        elif not os.path.exists(source) and (matches := sorted(glob.glob(source, recursive=True))):
            yield from find_images(matches, stdin)
        else:
            yield source


def predict(
    classifier: Classifier, sources: Iterable[str], *, top_k: int = 5, batch_size: int = 8
) -> Iterator[Prediction]:
    """Predict image files one batch after another, in the order of ``sources``.

    A file that cannot be decoded gives a ``Prediction`` with an ``error``. Raises ``ValueError``,
    before anything is read, when ``top_k`` or ``batch_size`` is not positive.
    """
    if top_k < 1 or batch_size < 1:
        raise ValueError(f"top_k and batch_size must be positive, got {top_k} and {batch_size}")
    return _predict(classifier, sources, top_k, batch_size)


def _images_under(folder: Path) -> list[str]:
    """Images in a folder and its subfolders, in order of their paths."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    return [str(path) for path in paths if not is_hidden(str(path.relative_to(folder)))]


def _predict(
    classifier: Classifier, sources: Iterable[str], top_k: int, batch_size: int
) -> Iterator[Prediction]:
    transform = classifier.preprocessing.eval_transform()
    remaining = iter(sources)
    while names := list(islice(remaining, batch_size)):
        errors: dict[int, str] = {}
        images: list[Tensor] = []
        for place, name in enumerate(names):
            try:
                images.append(transform(decode_image(name, classifier.preprocessing.image_mode)))
            except CorruptImageError as error:
                errors[place] = "no images in it" if os.path.isdir(name) else error.reason
        labels = iter(_classify(classifier, torch.stack(images), top_k) if images else ())
        for place, name in enumerate(names):
            if place in errors:
                yield Prediction(name, error=errors[place])
            else:
                yield Prediction(name, next(labels))


@torch.inference_mode()
def _classify(classifier: Classifier, images: Tensor, top_k: int) -> list[tuple[Label, ...]]:
    probabilities = classifier.model(images.to(classifier.device)).float().softmax(dim=1)
    best = probabilities.topk(min(top_k, probabilities.shape[1]))
    return [
        tuple(Label(i, classifier.class_names[i], p) for i, p in zip(*row, strict=True))
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]

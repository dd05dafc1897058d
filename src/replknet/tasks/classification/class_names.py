"""Names of the classes of well-known label sets."""

from __future__ import annotations

import re
from collections.abc import Sequence

from timm.data import ImageNetInfo
from torchvision.models._meta import _IMAGENET_CATEGORIES


def imagenet_1k_names() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet-1K in the usual order."""
    return tuple(_IMAGENET_CATEGORIES)


def imagenet_22k_names() -> tuple[str, ...]:
    """The 21,841 classes of ImageNet-22K (autumn 2011), in the order of their WordNet numbers."""
    return tuple(ImageNetInfo("imagenet-22k").label_descriptions())


def names_by_count(num_classes: int) -> tuple[str, ...]:
    """Names for a published checkpoint, which carries none; numbers for an unknown label set."""
    if num_classes == 1000:
        return imagenet_1k_names()
    if num_classes == 21841:
        return imagenet_22k_names()
    return tuple(str(index) for index in range(num_classes))


def readable_names(folders: Sequence[str]) -> tuple[str, ...]:
    """English names where all folders are named by WordNet numbers, the folders' names elsewhere.

    A name that two of the classes share has its WordNet number appended.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return tuple(folders)
    imagenet = ImageNetInfo("imagenet-1k")
    if list(folders) == imagenet.label_names():
        return imagenet_1k_names()
    known = set(ImageNetInfo("imagenet-22k").label_names())
    names = [
        imagenet.label_name_to_description(name) if name in known else name for name in folders
    ]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({folder})"
        for name, folder in zip(names, folders, strict=True)
    )

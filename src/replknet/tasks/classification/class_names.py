"""Names of the classes of well-known label sets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo
from torchvision.models._meta import _IMAGENET_CATEGORIES


def imagenet_1k_names() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet-1K in the usual order."""
    return tuple(_IMAGENET_CATEGORIES)


def imagenet_22k_names() -> tuple[str, ...]:
    """The 21,841 classes of ImageNet-22K (autumn 2011), in the order of their WordNet numbers."""
    names = _names_by_wordnet_number()
    return tuple(names[number] for number in ImageNetInfo("imagenet-22k").label_names())


def names_by_count(num_classes: int) -> tuple[str, ...]:
    """Names for a published checkpoint, which carries none; numbers for an unknown label set."""
    if num_classes == 1000:
        return imagenet_1k_names()
    if num_classes == 21841:
        return imagenet_22k_names()
    return tuple(str(index) for index in range(num_classes))


def readable_names(folders: Sequence[str]) -> tuple[str, ...]:
    """English names where all folders are named by WordNet numbers, the folders' names elsewhere.

    A class has the same name in every set of folders, and as an output of a published model.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return tuple(folders)
    names = _names_by_wordnet_number()
    return tuple(names.get(folder, folder) for folder in folders)


@cache
def _names_by_wordnet_number() -> dict[str, str]:
    """A name of its own for each class of ImageNet-1K and ImageNet-22K.

    Those of ImageNet-1K have their usual names; any other that shares its name has its WordNet
    number appended.
    """
    usual = dict(zip(ImageNetInfo("imagenet-1k").label_names(), _IMAGENET_CATEGORIES, strict=True))
    every = ImageNetInfo("imagenet-22k")
    names = {number: every.label_name_to_description(number) for number in every.label_names()}
    names |= usual
    count = Counter(names.values())
    return {
        number: name if number in usual or count[name] == 1 else f"{name} ({number})"
        for number, name in names.items()
    }

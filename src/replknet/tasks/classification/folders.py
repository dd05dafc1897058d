"""One folder per class, with a validation folder or without."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from PIL.Image import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

from replknet.tasks.classification.class_names import readable_names
from replknet.tasks.classification.decoding import ImageMode, decode_image

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test"),
}


class FolderDataset:
    """Image files with a class each."""

    def __init__(
        self, samples: list[tuple[str, int]], class_names: tuple[str, ...], mode: ImageMode
    ) -> None:
        self.samples = samples
        self.class_names = class_names
        self.mode = mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        path, target = self.samples[index]
        return decode_image(path, self.mode), target

    def source(self, index: int) -> str:
        return self.samples[index][0]


def open_folder(
    root: Path, split: str, mode: ImageMode, val_fraction: float, seed: int
) -> FolderDataset:
    """Open ``root/train`` and ``root/val`` (ImageNet's layout), or split ``root`` itself.

    Without either (see ``split_folders``), each class folder of ``root`` gives ``val_fraction`` of
    its images to the validation split, by the hash of their names, so that the same files are held
    out on every machine. ImageNet's class folders (``n01440764``) are given their English names.
    """
    found = split_folders(root)
    if not found:
        classes = _class_folders(root)
        samples = _split(root, _samples(root, classes), split, val_fraction, seed)
        return FolderDataset(samples, readable_names(classes), mode)
    if split not in found:
        raise ValueError(
            f"{root} has no folder for the {split} split; add one of "
            f"{', '.join(SPLIT_FOLDERS[split])}, or pass {next(iter(found.values()))} as "
            "data.root to have it split in two"
        )
    classes = _class_folders(found[split])
    if len(found) == 2:
        train, val = found["train"], found["val"]
        _require_same(_class_folders(train), _class_folders(val), train, val)
    return FolderDataset(_samples(found[split], classes), readable_names(classes), mode)


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of the training and validation images, by split, as far as there are any.

    A lone one counts only if it has class folders: beside ``car`` and ``bus``, ``train`` is a
    class.
    """
    first = {split: _first_folder(root, names) for split, names in SPLIT_FOLDERS.items()}
    found = {split: folder for split, folder in first.items() if folder}
    return found if len(found) == 2 or any(map(_has_folders, found.values())) else {}


def is_split_by_hand(root: Path) -> bool:
    """Whether ``root`` has training and validation folders with class folders in them."""
    found = split_folders(root)
    return len(found) == 2 and all(map(_has_folders, found.values()))


def is_hidden(relative: str) -> bool:
    """Whether a file, by its path within a data set, or a folder on the way to it is hidden.

    Such files are not the user's images but what systems leave beside them: macOS's ``._1.jpg``.
    """
    return f"{os.sep}." in f"{os.sep}{relative}"


def _first_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _has_folders(root: Path) -> bool:
    return any(entry.is_dir() and not is_hidden(entry.name) for entry in root.iterdir())


def _class_folders(root: Path) -> list[str]:
    entries = [entry for entry in root.iterdir() if not is_hidden(entry.name)]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        files = sum(has_file_allowed_extension(entry.name, IMG_EXTENSIONS) for entry in entries)
        found = f"{files} images side by side" if files else "no images"
        raise ValueError(
            f"{root} has no class folders ({found}); put the images of each class "
            "into a folder named after it"
        )
    return names


def _samples(root: Path, classes: list[str]) -> list[tuple[str, int]]:
    """All images under the class folders, in the order of class and path."""
    numbers = {name: index for index, name in enumerate(classes)}
    found = make_dataset(root, numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    samples = [sample for sample in found if not is_hidden(sample[0].removeprefix(str(root)))]
    empty = sorted(set(classes) - {classes[target] for _, target in samples})
    if empty:
        raise ValueError(
            f"no images in {len(empty)} of the {len(classes)} class folders of {root}: "
            f"{_some(empty)}; images end in {' '.join(IMG_EXTENSIONS)}"
        )
    return samples


def _require_same(train: list[str], val: list[str], train_root: Path, val_root: Path) -> None:
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if only_train or only_val:
        raise ValueError(
            f"{train_root} and {val_root} must hold the same class folders; "
            f"only in the first: {_some(only_train)}; only in the second: {_some(only_val)}"
        )


def _split(
    root: Path, samples: list[tuple[str, int]], split: str, val_fraction: float, seed: int
) -> list[tuple[str, int]]:
    """The part of ``samples`` that belongs to a split; every class is in both."""

    def rank(sample: tuple[str, int]) -> bytes:
        name = Path(sample[0]).relative_to(root).as_posix()
        return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()

    by_class: dict[int, list[tuple[str, int]]] = {}
    for sample in samples:
        by_class.setdefault(sample[1], []).append(sample)
    held_out: set[tuple[str, int]] = set()
    for members in by_class.values():
        if len(members) < 2:
            raise ValueError(
                f"cannot split {Path(members[0][0]).parent}: it holds a single image; "
                "add images, or make train and val folders by hand"
            )
        count = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        held_out.update(sorted(members, key=rank)[:count])
    return [sample for sample in samples if (sample in held_out) == (split == "val")]


def _some(names: list[str]) -> str:
    """At most five names, for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(map(repr, names[:5])) or "none") + more

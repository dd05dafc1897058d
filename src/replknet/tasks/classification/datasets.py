"""Which images to learn from, and how to find them: one configuration, one function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL.Image import Image

from replknet.tasks.classification import arrays, folders, shards
from replknet.tasks.classification.decoding import ImageMode

Split = Literal["train", "val"]
Format = Literal["folder", "fashion-mnist", "idx", "cifar10", "cifar100", "webdataset"]

_MORE_CLASSES = {
    "folder": "give each class its own folder",
    "webdataset": "name every class in classes.txt, one a line",
}


class ImageDataset(Protocol):
    """Labelled images in a fixed order."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image, int]:
        """Image and class number; raises ``CorruptImageError`` when it cannot be decoded."""
        ...

    def source(self, index: int) -> str:
        """Where image ``index`` comes from, for people."""
        ...


@dataclass(frozen=True)
class DataConfig:
    """A data set on disk.

    Args:
        root: folder of the data set; null only for the 5,000 + 1,000 images of Fashion-MNIST that
            come with the package (``format="fashion-mnist"``).
        format: "auto" tells it by the files in the folder.
        val_fraction: share of each class that is held out when an image folder has no train and
            val folders of its own.
        split_seed: chooses which images these are.
        max_corrupt_fraction: images that cannot be decoded are left out and listed; more than
            this share of them, and more than one, is an error.
    """

    root: str | None = None
    format: Literal["auto"] | Format = "auto"
    val_fraction: float = 0.2
    split_seed: int = 0
    max_corrupt_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.root is None and self.format != "fashion-mnist":
            raise ValueError(
                f"data.root is missing: pass the folder of the data set (format {self.format!r}), "
                "or format 'fashion-mnist' for the images that come with the package"
            )
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        if not 0 <= self.max_corrupt_fraction <= 1:
            raise ValueError(
                f"max_corrupt_fraction must be in [0, 1], got {self.max_corrupt_fraction}"
            )


def split_of(config: DataConfig) -> dict[str, Any]:
    """The fields that say which images of one folder are held out for validation."""
    return {"val_fraction": config.val_fraction, "split_seed": config.split_seed}


def open_dataset(config: DataConfig, split: Split, *, mode: ImageMode = "RGB") -> ImageDataset:
    """Find the images of one split; they are decoded in ``mode`` when asked for.

    Raises ``ValueError`` when the folder is missing or empty, does not look like ``config.format``,
    or holds fewer than two classes.
    """
    if config.root is None:
        return arrays.shipped_fashion_mnist(split, mode)
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.root is not a folder: {root}")
    if config.format != "auto":
        return _read(root, config.format, config, split, mode)
    guess = detect_format(root)
    with _told_as_guess(guess):
        return _read(root, guess, config, split, mode)


def _read(
    root: Path, format: Format, config: DataConfig, split: Split, mode: ImageMode
) -> ImageDataset:
    readers: dict[Format, Callable[[], ImageDataset]] = {
        "folder": lambda: folders.open_folder(
            root, split, mode, config.val_fraction, config.split_seed
        ),
        "fashion-mnist": lambda: arrays.read_idx(root, split, mode, arrays.FASHION_MNIST_CLASSES),
        "idx": lambda: arrays.read_idx(root, split, mode),
        "cifar10": lambda: arrays.read_cifar10(root, split, mode),
        "cifar100": lambda: arrays.read_cifar100(root, split, mode),
        "webdataset": lambda: shards.open_shards(root, split, mode),
    }
    dataset = readers[format]()
    if len(dataset.class_names) < 2:
        only = ", ".join(map(repr, dataset.class_names)) or "none"
        raise ValueError(
            f"a classifier needs at least two classes, but the {split} split of {root} has only "
            f"{only}; {_MORE_CLASSES.get(format, 'add images of other classes')}"
        )
    if not len(dataset):
        raise ValueError(f"the {split} split of {root} holds no images")
    return dataset


def detect_format(root: Path) -> Format:
    """Recognise a data set by what lies in its folder; hidden files do not count."""
    names = {entry.name for entry in root.iterdir() if not folders.is_hidden(entry.name)}
    if not names:
        raise ValueError(f"data.root is empty: {root}")
    if folders.is_split_by_hand(root):
        return "folder"
    if "cifar-10-batches-py" in names:
        return "cifar10"
    if "cifar-100-python" in names:
        return "cifar100"
    if any("idx3-ubyte" in name for name in names):
        with _told_as_guess("idx"):
            return "fashion-mnist" if arrays.is_fashion_mnist(root) else "idx"
    if any(name.endswith(".tar") for name in names):
        return "webdataset"
    return "folder"


@contextmanager
def _told_as_guess(format: Format) -> Iterator[None]:
    """Have errors say that the format was guessed, and how to choose it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{error} (format {format!r} was guessed from what lies there; --data.format overrides "
            "that)"
        ) from error

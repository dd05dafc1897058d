"""Data sets of small images that fit in memory: Fashion-MNIST, other IDX files, CIFAR."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from replknet.tasks.classification.decoding import ImageMode

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_FASHION_MNIST_LABELS = "a2d1512599a9270ae0b22c236d1bb6c9faf54db68c3cb38be103496028e48209"
_IDX_PREFIX = {"train": "train", "val": "t10k"}


class ArrayDataset:
    """Images of one size in an array, (N, H, W) or (N, H, W, 3) of bytes."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        targets: NDArray[np.integer],
        class_names: Sequence[str],
        mode: ImageMode,
        name: str,
    ) -> None:
        if len(images) != len(targets):
            raise ValueError(f"{name} has {len(images)} images but {len(targets)} labels")
        if len(targets) and not 0 <= targets.min() <= targets.max() < len(class_names):
            raise ValueError(
                f"{name} has labels from {targets.min()} to {targets.max()}, "
                f"which do not fit {len(class_names)} classes"
            )
        self.images = images
        self.targets = targets
        self.class_names = tuple(class_names)
        self.mode = mode
        self.name = name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert(self.mode), int(self.targets[index])

    def source(self, index: int) -> str:
        return f"{self.name}[{index}]"


def shipped_fashion_mnist(split: str, mode: ImageMode = "L") -> ArrayDataset:
    """The first 5,000 training and 1,000 test images of Fashion-MNIST, 28x28, in the package."""
    with (
        (files("replknet") / "data" / "fashion_mnist_subset.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        images, targets = arrays[f"{split}_images"], arrays[f"{split}_targets"]
    return ArrayDataset(images, targets, FASHION_MNIST_CLASSES, mode, f"fashion-mnist/{split}")


def read_idx(
    root: Path, split: str, mode: ImageMode = "L", class_names: Sequence[str] | None = None
) -> ArrayDataset:
    """MNIST's file format, gzipped or not; classes are called by their numbers unless named."""
    images = _read_idx_file(root, f"{_IDX_PREFIX[split]}-images-idx3-ubyte")
    targets = _read_idx_file(root, f"{_IDX_PREFIX[split]}-labels-idx1-ubyte")
    if class_names is None:
        class_names = [str(number) for number in range(int(targets.max(initial=0)) + 1)]
    return ArrayDataset(images, targets, class_names, mode, f"{root.name}/{split}")


def is_fashion_mnist(root: Path) -> bool:
    """Whether the IDX files in ``root`` are Fashion-MNIST, told by the labels they begin with."""
    labels = _read_idx_file(root, f"{_IDX_PREFIX['train']}-labels-idx1-ubyte")
    return hashlib.sha256(labels[:1000].tobytes()).hexdigest() == _FASHION_MNIST_LABELS


def read_cifar10(root: Path, split: str, mode: ImageMode = "RGB") -> ArrayDataset:
    """CIFAR-10 from ``root/cifar-10-batches-py``; the files must be the published ones."""
    return _from_torchvision(CIFAR10, root, split, mode)


def read_cifar100(root: Path, split: str, mode: ImageMode = "RGB") -> ArrayDataset:
    """CIFAR-100 from ``root/cifar-100-python``; the files must be the published ones."""
    return _from_torchvision(CIFAR100, root, split, mode)


def _from_torchvision(kind: type[CIFAR10], root: Path, split: str, mode: ImageMode) -> ArrayDataset:
    try:
        # torchvision compares the files with their published digests before it unpickles them.
        data = kind(root, train=split == "train", download=False)
    except RuntimeError as error:
        raise ValueError(
            f"{root / kind.base_folder} is missing or is not the published {kind.__name__}; "
            f"unpack {kind.filename} (from {kind.url}) into {root}"
        ) from error
    targets = np.asarray(data.targets)
    return ArrayDataset(data.data, targets, data.classes, mode, f"{kind.__name__.lower()}/{split}")


def _read_idx_file(root: Path, name: str) -> NDArray[np.uint8]:
    """One array of bytes: magic number with the rank, sizes as big-endian words, the data."""
    path = next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"{root} has neither {name} nor {name}.gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    rank = data[3] if len(data) > 3 else 0
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    pixels = np.frombuffer(data, np.uint8, offset=min(4 + 4 * rank, len(data)))
    if data[:3] != b"\0\0\x08" or pixels.size != np.prod(sizes):
        raise ValueError(f"{path} is damaged or not an IDX file of bytes")
    return pixels.reshape(sizes)

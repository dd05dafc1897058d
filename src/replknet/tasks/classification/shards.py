"""Webdataset shards: tar files in which samples are neighbouring files with one stem."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL.Image import Image
from timm.data.readers import create_reader

from replknet.tasks.classification.class_names import names_by_count
from replknet.tasks.classification.decoding import CorruptImageError, ImageMode, decode_image

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
_SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "test")}


@dataclass(frozen=True)
class ShardSample:
    """Where the bytes of one image lie inside its shard."""

    shard: Path
    name: str
    offset: int
    size: int
    target: int


class ShardDataset:
    """Images in tar files, read by their position.

    Random access instead of a stream, so that an epoch's order depends only on the seed, a run
    resumes in the middle of an epoch, and evaluation counts each image once on any number of
    processes. The shards must therefore be local (or mounted) files.
    """

    def __init__(
        self, samples: list[ShardSample], class_names: tuple[str, ...], mode: ImageMode
    ) -> None:
        self.samples = samples
        self.class_names = class_names
        self.mode = mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        sample = self.samples[index]
        try:
            with sample.shard.open("rb") as file:
                file.seek(sample.offset)
                data = file.read(sample.size)
        except OSError as error:
            raise CorruptImageError(self.source(index), str(error)) from error
        return decode_image(data, self.mode, source=self.source(index)), sample.target

    def source(self, index: int) -> str:
        sample = self.samples[index]
        return f"{sample.shard}/{sample.name}"


def open_shards(root: Path, split: str, mode: ImageMode) -> ShardDataset:
    """Index the shards of one split.

    The split's files are those that timm's reader finds: by ``_info.json`` (``splits``,
    ``filenames``, ``shard_lengths``), or, without one, ``*train*.tar`` and ``*val*.tar``. A sample
    has an image (jpg, jpeg, png, webp) and its class number (cls). Names of the classes come from
    ``classes.txt``, one a line, or from ImageNet where their number fits.
    """
    samples = [sample for shard in _shard_files(root, split) for sample in _index(shard)]
    if not samples:
        raise ValueError(f"the {split} shards of {root} hold no samples with an image and a cls")
    count = max(sample.target for sample in samples) + 1
    return ShardDataset(samples, _class_names(root, count), mode)


def _shard_files(root: Path, split: str) -> list[Path]:
    names = _SPLIT_NAMES[split]
    if any((root / info).is_file() for info in ("_info.json", "info.json")):
        return [root / file for file in _described_files(root, names)]
    shards = sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))
    files = [path for path in shards if any(name in path.name for name in names)]
    if not files:
        raise ValueError(f"{root} has no *.tar file with one of {', '.join(names)} in its name")
    return files


def _described_files(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Files of the first split of these names that the data set's description has."""
    if find_spec("webdataset") is None:
        raise ValueError(
            f"reading the description of {root} needs webdataset: "
            "pip install 'replknet[webdataset]'"
        )
    for name in names:
        try:
            return create_reader("wds/", root=str(root), split=name).split_info.filenames
        except RuntimeError:  # timm's word for a split that the description lacks
            continue
    raise ValueError(f"the description of {root} has none of the splits {', '.join(names)}")


def _index(shard: Path) -> list[ShardSample]:
    """Samples of one shard, in its order; those without image or class are passed over."""
    images: dict[str, tarfile.TarInfo] = {}
    targets: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = f"{folder}/{stem}"
                if extension.lower() in IMAGE_KEYS:
                    images[key] = member
                elif extension == "cls" and (content := archive.extractfile(member)):
                    targets[key] = int(content.read())
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"cannot read the shard {shard}: {error}") from error
    return [
        ShardSample(shard, member.name, member.offset_data, member.size, targets[key])
        for key, member in images.items()
        if targets.get(key, -1) >= 0
    ]


def _class_names(root: Path, count: int) -> tuple[str, ...]:
    if not (root / "classes.txt").is_file():
        return names_by_count(count)
    lines = (root / "classes.txt").read_text(encoding="utf-8").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) < count:
        raise ValueError(
            f"{root / 'classes.txt'} names {len(names)} classes, but the shards have labels up to "
            f"{count - 1}"
        )
    return names

"""Batches that depend on the seed alone: not on workers, processes, or where a run resumed."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from replknet.tasks.classification.datasets import ImageDataset
from replknet.tasks.classification.decoding import CorruptImageError
from replknet.tasks.classification.preprocessing import Transform
from replknet.tasks.classification.randomness import (
    Purpose,
    derive_seed,
    preserved_generators,
    seed_generators,
)
from replknet.tasks.task import LoaderOptions

# image (N, C, H, W) float32; target (N,) int64, or (N, classes) float32 when mixed; index (N,)
# int64, the images' places in the data set; skipped (), how many corrupt images were left out.
Batch = dict[str, Tensor]

_SUBSTITUTES = 100  # how many images in a row may be corrupt before a sample is given up

_logger = logging.getLogger(__name__)


class CorruptDataError(ValueError):
    """More of a data set's images are corrupt than its configuration allows."""


class BatchKey(NamedTuple):
    """What a batch of training images is made from."""

    epoch: int
    number: int
    indices: list[int]


class Corrupt(NamedTuple):
    """An image that could not be decoded."""

    source: str
    reason: str


class CorruptImages:
    """The corrupt images met so far, each once, and the share of them that is tolerated.

    One is tolerated in a set of any size, unless the share is 0. ``found`` maps their sources to
    the reasons.
    """

    def __init__(self, images: int, max_fraction: float) -> None:
        self.images = images
        self.max_fraction = max_fraction
        self.tolerated = max(1.0, max_fraction * images) if max_fraction else 0.0
        self.found: dict[str, str] = {}

    def add(self, corrupt: Iterable[Corrupt]) -> None:
        """Note and log images; raises ``CorruptDataError`` when there are too many."""
        for source, reason in corrupt:
            if source not in self.found:
                self.found[source] = reason
                _logger.warning("left out corrupt image %s: %s", source, reason)
        if len(self.found) > self.tolerated:
            listed = "".join(f"\n  {s}: {r}" for s, r in list(self.found.items())[:10])
            raise CorruptDataError(
                f"{len(self.found)} of {self.images} images are corrupt, more than the "
                f"{self.max_fraction:.2%} that data.max_corrupt_fraction allows; "
                f"repair or remove them, or raise it. The first:{listed}"
            )


class TrainLoader:
    """Shuffled, augmented batches; see ``LoaderOptions`` for what they depend on.

    Batch ``i`` of all processes together holds the samples of batch ``i`` of one process with the
    total batch size, mixed with the same partners. Images left over at the end of an epoch are
    dropped. A corrupt image is replaced by another one of the set, always the same in an epoch.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        options: LoaderOptions,
        *,
        mix: Mixup | None = None,
        max_corrupt_fraction: float = 0.01,
    ) -> None:
        self._options = options
        self._images = len(dataset)
        self._total = options.batch_size * options.world_size
        if len(self) == 0:
            raise ValueError(
                f"the training split has {self._images} images, fewer than one batch of "
                f"{options.batch_size} on {options.world_size} processes; lower the batch size"
            )
        if mix is not None and options.batch_size % 2:
            raise ValueError(
                f"mixup and cutmix need an even batch size, got {options.batch_size} per process"
            )
        self.corrupt = CorruptImages(self._images, max_corrupt_fraction)
        self._keys: list[BatchKey] = []
        self._loader = _data_loader(
            _TrainBatches(dataset, transform, mix, options.seed), self._keys, options, keep=True
        )

    def __len__(self) -> int:
        return self._images // self._total

    def epoch(self, epoch: int, *, skip: int = 0) -> Iterator[Batch]:
        """Batches of one epoch from number ``skip`` on."""
        generator = torch.Generator().manual_seed(
            derive_seed(Purpose.ORDER, self._options.seed, epoch)
        )
        order = torch.randperm(self._images, generator=generator)
        places = torch.tensor(process_places(self._options))
        self._keys[:] = [
            BatchKey(epoch, number, order[number * self._total + places].tolist())
            for number in range(skip, len(self))
        ]
        for batch, corrupt in self._loader:
            self.corrupt.add(corrupt)
            yield batch


class EvalLoader:
    """Every image once over all processes, in order, without augmentation.

    Corrupt images are left out and counted in ``batch["skipped"]``; a batch may be empty.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        options: LoaderOptions,
        *,
        max_corrupt_fraction: float = 0.01,
    ) -> None:
        mine = range(options.rank, len(dataset), options.world_size)
        size = options.batch_size
        self._keys = [list(mine[start : start + size]) for start in range(0, len(mine), size)]
        self.corrupt = CorruptImages(len(dataset), max_corrupt_fraction)
        self._loader = _data_loader(
            _EvalBatches(dataset, transform), self._keys, options, keep=False
        )

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Batch]:
        for batch, corrupt in self._loader:
            self.corrupt.add(corrupt)
            yield batch


def process_places(options: LoaderOptions) -> list[int]:
    """Places of one process's samples within a total batch.

    Mixup blends sample ``k`` of a batch with sample ``-1 - k``. Each process takes a run of places
    and their mirror images, so that the partners within its batch are those within the total batch.
    """
    size, rank, total = options.batch_size, options.rank, options.batch_size * options.world_size
    if size % 2:
        return list(range(rank * size, (rank + 1) * size))
    first = rank * (size // 2)
    last = first + size // 2
    return [*range(first, last), *range(total - last, total - first)]


class _TrainBatches(Dataset[tuple[Batch, list[Corrupt]]]):
    """Makes whole batches, in the worker that is asked for them."""

    def __init__(
        self, dataset: ImageDataset, transform: Transform, mix: Mixup | None, seed: int
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.mix = mix
        self.seed = seed

    def __getitem__(self, key: BatchKey) -> tuple[Batch, list[Corrupt]]:
        corrupt: list[Corrupt] = []
        images, targets, indices = [], [], []
        with preserved_generators():
            for index in key.indices:
                used, picture, target = self._decode(key.epoch, index, corrupt)
                seed_generators(derive_seed(Purpose.SAMPLE, self.seed, key.epoch, index))
                images.append(self.transform(picture))
                targets.append(target)
                indices.append(used)
            image, goal = torch.stack(images), torch.tensor(targets)
            if self.mix is not None:
                seed_generators(derive_seed(Purpose.MIX, self.seed, key.epoch, key.number))
                image, goal = self.mix(image, goal)
        batch = {"image": image, "target": goal, "index": torch.tensor(indices)}
        return {**batch, "skipped": torch.tensor(0)}, corrupt

    def _decode(self, epoch: int, index: int, corrupt: list[Corrupt]) -> tuple[int, Any, int]:
        """The sample at ``index``, or the first that can be decoded of its substitutes."""
        candidate = index
        for attempt in range(_SUBSTITUTES):
            try:
                return (candidate, *self.dataset[candidate])
            except CorruptImageError as error:
                corrupt.append(Corrupt(error.source, error.reason))
            seed = derive_seed(Purpose.SUBSTITUTE, self.seed, epoch, index, attempt)
            candidate = seed % len(self.dataset)
        raise CorruptDataError(
            f"{_SUBSTITUTES} images picked at random are all corrupt; "
            f"the last: {corrupt[-1].source}: {corrupt[-1].reason}"
        )


class _EvalBatches(Dataset[tuple[Batch, list[Corrupt]]]):
    """Makes whole batches of the images that can be decoded."""

    def __init__(self, dataset: ImageDataset, transform: Transform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __getitem__(self, indices: list[int]) -> tuple[Batch, list[Corrupt]]:
        corrupt: list[Corrupt] = []
        images, targets, decoded = [], [], []
        for index in indices:
            try:
                picture, target = self.dataset[index]
            except CorruptImageError as error:
                corrupt.append(Corrupt(error.source, error.reason))
                continue
            images.append(self.transform(picture))
            targets.append(target)
            decoded.append(index)
        batch = {
            "image": torch.stack(images) if images else torch.empty(0),
            "target": torch.tensor(targets, dtype=torch.int64),
            "index": torch.tensor(decoded, dtype=torch.int64),
            "skipped": torch.tensor(len(corrupt)),
        }
        return batch, corrupt


def _data_loader(
    batches: Dataset[Any], keys: Iterable[Any], options: LoaderOptions, *, keep: bool
) -> DataLoader[Any]:
    return DataLoader(
        batches,
        batch_size=None,
        sampler=keys,
        num_workers=options.workers,
        persistent_workers=keep and options.workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that an epoch draws nothing from the global one
        worker_init_fn=_ignore_stop_signals,
    )


def _ignore_stop_signals(_: int) -> None:
    """Leave it to the training process when to stop.

    Launchers send a signal to all processes; a worker that dies of it makes the DataLoader raise
    in the training process, at any point, even while that writes its last checkpoint.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """End the workers of loaders that are alive at exit.

    Left to itself, multiprocessing asks its daemons with SIGTERM, and waits for ever.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises when workers die
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()

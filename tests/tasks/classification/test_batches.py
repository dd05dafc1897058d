import logging
import pickle
import random
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from replknet.tasks.classification import Augmentation, Preprocessing
from replknet.tasks.classification.decoding import CorruptImageError
from replknet.tasks.classification.loader import (
    CorruptDataError,
    EvalLoader,
    TrainLoader,
    process_places,
)
from replknet.tasks.classification.randomness import (
    Purpose,
    derive_seed,
    preserved_generators,
    seed_generators,
)
from replknet.tasks.task import LoaderOptions

PREPROCESSING = Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
AUGMENTATION = Augmentation()  # everything random that there is


class Pictures:
    """Images of random pixels, some of them corrupt."""

    def __init__(self, count, corrupt=()):
        self.count = count
        self.corrupt = frozenset(corrupt)
        self.class_names = ("a", "b", "c")

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.corrupt:
            raise CorruptImageError(self.source(index), "broken on purpose")
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 3

    def source(self, index):
        return f"picture {index}"


def train_loader(pictures=None, batch_size=4, *, mixes=True, **options):
    fraction = options.pop("max_corrupt_fraction", 0.01)
    return TrainLoader(
        pictures or Pictures(26),
        AUGMENTATION.train_transform(PREPROCESSING),
        LoaderOptions(batch_size, **options),
        mix=AUGMENTATION.mix(3) if mixes else None,
        max_corrupt_fraction=fraction,
    )


def eval_loader(pictures, batch_size=4, *, max_corrupt_fraction=0.01, **options):
    return EvalLoader(
        pictures,
        PREPROCESSING.eval_transform(),
        LoaderOptions(batch_size, **options),
        max_corrupt_fraction=max_corrupt_fraction,
    )


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            assert torch.equal(batch[key], other[key]), key


def by_index(*batches):
    """The rows of several batches, in the order of their images."""
    order = torch.cat([batch["index"] for batch in batches]).argsort()
    return {k: torch.cat([b[k] for b in batches])[order] for k in ("index", "image", "target")}


# Training


def test_an_epoch_shows_each_image_once_and_drops_the_rest():
    batches = list(train_loader().epoch(0))
    assert len(batches) == len(train_loader()) == 6
    indices = torch.cat([batch["index"] for batch in batches])
    assert len(indices.unique()) == 24
    assert batches[0]["image"].shape == (4, 3, 16, 16)
    assert batches[0]["target"].shape == (4, 3)
    torch.testing.assert_close(batches[0]["target"].sum(1), torch.ones(4))


def test_targets_are_numbers_when_nothing_is_mixed():
    for batch in train_loader(mixes=False).epoch(3):
        assert torch.equal(batch["target"], batch["index"] % 3)


def test_epochs_differ_in_order_and_in_changes():
    loader = train_loader(mixes=False)
    first, second = (by_index(*loader.epoch(epoch)) for epoch in (0, 1))
    orders = [torch.cat([b["index"] for b in loader.epoch(epoch)]) for epoch in (0, 1)]
    assert not torch.equal(*orders)
    common = [
        (i, j)
        for i, a in enumerate(first["index"])
        for j, b in enumerate(second["index"])
        if a == b
    ]
    assert len(common) > 15
    for i, j in common:
        assert not torch.equal(first["image"][i], second["image"][j])


def test_the_seed_decides():
    assert_same(list(train_loader(seed=5).epoch(2)), list(train_loader(seed=5).epoch(2)))
    one, other = next(train_loader(seed=5).epoch(2)), next(train_loader(seed=6).epoch(2))
    assert not torch.equal(one["index"], other["index"])


@pytest.mark.parametrize("skip", [1, 4, 6, 9])
def test_resuming_in_the_middle_gives_the_remaining_batches(skip):
    loader = train_loader()
    whole = list(loader.epoch(1))
    assert_same(list(train_loader().epoch(1, skip=skip)), whole[skip:])
    iterator = loader.epoch(1)
    next(iterator)  # abandoned
    assert_same(list(loader.epoch(1, skip=skip)), whole[skip:])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    loader = train_loader(Pictures(26, corrupt=[3]), workers=workers, max_corrupt_fraction=1)
    alone = train_loader(Pictures(26, corrupt=[3]), max_corrupt_fraction=1)
    for epoch in (0, 1):
        assert_same(list(loader.epoch(epoch)), list(alone.epoch(epoch)))
    assert loader.corrupt.found == alone.corrupt.found == {"picture 3": "broken on purpose"}


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_make_the_batches_of_one(processes, mixes):
    one = list(train_loader(batch_size=4 * processes, mixes=mixes).epoch(1))
    parts = [
        list(train_loader(rank=rank, world_size=processes, mixes=mixes).epoch(1))
        for rank in range(processes)
    ]
    for number, batch in enumerate(one):
        together = by_index(*(part[number] for part in parts))
        for key, value in by_index(batch).items():
            assert torch.equal(together[key], value), key


def test_places_of_processes_are_a_partition_closed_under_mirroring():
    for size, processes in ((2, 5), (8, 4), (6, 1)):
        places = [
            process_places(LoaderOptions(size, rank=r, world_size=processes))
            for r in range(processes)
        ]
        total = size * processes
        assert sorted(place for mine in places for place in mine) == list(range(total))
        for mine in places:
            assert [total - 1 - place for place in mine] == mine[::-1]
    odd = [process_places(LoaderOptions(3, rank=r, world_size=2)) for r in range(2)]
    assert odd == [[0, 1, 2], [3, 4, 5]]


def test_the_global_generators_are_left_alone():
    def state():
        generators = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        return *generators, torch.get_rng_state().tolist()

    before = state()
    list(train_loader(workers=1).epoch(0))
    list(train_loader().epoch(0))
    list(eval_loader(Pictures(5)))
    assert state() == before


def test_too_few_images_and_odd_batches_are_refused():
    with pytest.raises(ValueError, match="26 images, fewer than one batch of 16 on 2 processes"):
        train_loader(batch_size=16, world_size=2)
    with pytest.raises(ValueError, match="even batch size, got 5"):
        train_loader(batch_size=5)
    assert len(train_loader(batch_size=5, mixes=False)) == 5


def test_a_corrupt_image_is_replaced_always_by_the_same(caplog):
    pictures = Pictures(26, corrupt=[2, 7])
    loader = train_loader(pictures, max_corrupt_fraction=0.1, mixes=False)
    with caplog.at_level(logging.WARNING):
        batches = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    assert loader.corrupt.found == {f"picture {i}": "broken on purpose" for i in (2, 7)}
    assert sorted(r.message.split(":")[0][-9:] for r in caplog.records) == [
        "picture 2",
        "picture 7",
    ]
    indices = torch.cat([batch["index"] for batch in batches[0]]).tolist()
    assert len(indices) == 24
    assert not {2, 7} & set(indices)
    for batch in batches[1]:
        assert torch.equal(batch["target"], batch["index"] % 3)
    again = train_loader(pictures, max_corrupt_fraction=0.1, mixes=False)
    assert_same(list(again.epoch(1, skip=2)), batches[1][2:])


@pytest.mark.parametrize("workers", [0, 1])
def test_more_corrupt_images_than_allowed_stop_the_epoch(workers):
    loader = train_loader(
        Pictures(26, corrupt=[1, 5, 9]), max_corrupt_fraction=0.1, workers=workers, mixes=False
    )
    with pytest.raises(CorruptDataError) as caught:
        list(chain.from_iterable(map(loader.epoch, range(3))))
    message = str(caught.value)
    assert "3 of 26 images are corrupt, more than the 10.00%" in message
    assert "picture 5: broken on purpose" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_a_single_good_image_stops(workers):
    loader = train_loader(Pictures(26, corrupt=range(26)), max_corrupt_fraction=1, workers=workers)
    with pytest.raises(CorruptDataError, match="all corrupt"):
        next(loader.epoch(0))


LOADER_LEFT_ALIVE = """
import test_batches
loader = test_batches.train_loader(workers=2, mixes=False)
batches = loader.epoch(0)
next(batches)
print("ready", flush=True)
"""


def test_process_ends_although_its_loader_is_alive():
    done = subprocess.run(
        [sys.executable, "-c", LOADER_LEFT_ALIVE],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "ready\n"
    assert done.returncode == 0, done.stderr


# Evaluation


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_image_is_evaluated_exactly_once(processes):
    seen = []
    for rank in range(processes):
        loader = eval_loader(Pictures(7), batch_size=2, rank=rank, world_size=processes)
        batches = list(loader)
        assert len(batches) == len(loader)
        seen += [index for batch in batches for index in batch["index"].tolist()]
        assert all(len(batch["index"]) <= 2 for batch in batches)
    assert sorted(seen) == list(range(7))


def test_evaluation_can_be_repeated_and_has_workers():
    loader = eval_loader(Pictures(9), workers=1)
    first = list(loader)
    assert_same(list(loader), first)
    assert_same(list(eval_loader(Pictures(9))), first)
    expected = PREPROCESSING.eval_transform()(Pictures(9)[5][0])
    assert torch.equal(first[1]["image"][1], expected)


def test_corrupt_images_are_left_out_and_counted():
    loader = eval_loader(Pictures(7, corrupt=[0, 1, 5]), batch_size=2, max_corrupt_fraction=0.5)
    batches = list(loader)
    assert [batch["index"].tolist() for batch in batches] == [[], [2, 3], [4], [6]]
    assert [int(batch["skipped"]) for batch in batches] == [2, 0, 1, 0]
    assert sorted(loader.corrupt.found) == ["picture 0", "picture 1", "picture 5"]
    with pytest.raises(CorruptDataError, match="2 of 7 images are corrupt"):
        list(eval_loader(Pictures(7, corrupt=[0, 1]), max_corrupt_fraction=0.2))


# Randomness


def test_seeds_depend_on_every_part_and_are_fixed_for_ever():
    seeds = {derive_seed(p, a, b) for p in Purpose for a in range(20) for b in range(20)}
    assert len(seeds) == len(Purpose) * 400
    assert derive_seed(Purpose.SAMPLE, 1, 2, 3) == 4453857995811303276
    assert 0 <= min(seeds) <= max(seeds) < 2**63


def test_generators_are_seeded_and_restored():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    with preserved_generators():
        seed_generators(2**62 + 1)
        first = draw()
        seed_generators(2**62 + 1)
        assert draw() == first
    outside = draw()
    assert outside != first


def test_an_error_about_an_image_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(CorruptDataError("3 of 26")))
    assert str(error) == "3 of 26"

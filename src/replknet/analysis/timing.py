"""Times of calls that take turns, so that what else the machine does hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import quantiles
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]
SAMPLE_SECONDS = 0.005  # a sample repeats a fast call for so long
LONG_SECONDS = 0.5  # a call that takes so long warms up in a small part of its time
PAUSE_SECONDS = 0.003  # lets the waiting threads of another engine's pool fall asleep


def interleave(
    calls: Mapping[Key, Call], rounds: int, max_seconds: float = float("inf")
) -> dict[Key, list[float]]:
    """Seconds of a call, ``rounds`` samples of each: all once, then all again.

    The first call of each is not counted, and
    short calls are repeated. A call that has used up ``max_seconds`` is left out of the later
    rounds.
    """
    once, repeats, spent = {}, {}, {}
    for name, call in calls.items():
        once[name] = _sample(call, 1)
        if once[name] < LONG_SECONDS:
            once[name] = _sample(call, 1)
        repeats[name] = max(1, round(SAMPLE_SECONDS / once[name]))
        spent[name] = once[name]
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if samples[name] and spent[name] > max_seconds:
                continue
            time.sleep(PAUSE_SECONDS)
            if once[name] < LONG_SECONDS:
                call()  # wakes the threads and warms the caches after the others
            seconds = _sample(call, repeats[name])
            spent[name] += seconds * (repeats[name] + 1)
            samples[name].append(seconds)
    return samples


def _sample(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """So many threads of PyTorch in a ``with`` block; 0 for those there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

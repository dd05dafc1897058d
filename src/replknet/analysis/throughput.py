"""Measure how fast networks run on this machine, so that they can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Name = TypeVar("Name")


def interleaved_seconds(
    calls: Mapping[Name, Callable[[], object]], rounds: int
) -> dict[Name, list[float]]:
    """Time every call once a round, in turns, after one round that is not timed.

    Taking turns lets a change of the machine's speed meet all of them alike.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def images_per_second(
    networks: Mapping[Name, nn.Module], images: Tensor, rounds: int
) -> dict[Name, float]:
    """Median throughput of each network, in evaluation mode, on a batch (N, C, H, W)."""
    calls = {name: _inference(network, images) for name, network in networks.items()}
    times = interleaved_seconds(calls, rounds)
    return {name: len(images) / statistics.median(each) for name, each in times.items()}


def _inference(network: nn.Module, images: Tensor) -> Callable[[], object]:
    network.eval()

    @torch.inference_mode()
    def call() -> object:
        return network(images)

    return call

"""What re-parameterizing and fusing a trained network saves, and that it changes no prediction."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replknet.analysis.flops import CLASSIFICATION, count_operations
from replknet.deploy import Equivalence, compare, fuse, reparameterize

ROUNDS = 9


@dataclass(frozen=True)
class FormFigures:
    """One form of a network: its size, and the median time of a batch on this machine.

    ``flops`` are multiply-adds of one image in convolutions and linear layers; times are seconds
    a batch, of one image and of ``Deployment.batch``.
    """

    name: str
    parameters: int
    convolutions: int
    norms: int
    flops: int
    single: float
    batch: float


@dataclass(frozen=True)
class Deployment:
    """A trained network beside its deployed form, on the same images."""

    forms: tuple[FormFigures, ...]
    equivalence: Equivalence
    images: int
    batch: int
    threads: int


@torch.inference_mode()
def measure_deployment(model: nn.Module, images: Tensor, batch: int = 64) -> Deployment:
    """Compare a trained model with its merged and fused forms on ``images`` (N, C, H, W).

    Times are medians of rounds in which the forms take turns, so that a change of the machine's
    speed meets all of them alike.
    """
    merged = reparameterize(model.eval())
    networks = {"as trained": model, "re-parameterized": merged, "and fused": fuse(merged)}
    single, many = images[:1], images[:batch]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    for _ in range(ROUNDS):
        for name, network in networks.items():
            times[name].append((seconds(network, single), seconds(network, many)))
    figures = []
    for name, network in networks.items():
        ones, batches = zip(*times[name], strict=True)
        size = compare(network, network, single).after
        figures.append(
            FormFigures(
                name=name,
                parameters=size.parameters,
                convolutions=size.convolutions,
                norms=size.norms,
                flops=CLASSIFICATION.total(count_operations(network, single)),
                single=statistics.median(ones),
                batch=statistics.median(batches),
            )
        )
    return Deployment(
        forms=tuple(figures),
        equivalence=compare(model, networks["and fused"], images),
        images=len(images),
        batch=len(many),
        threads=torch.get_num_threads(),
    )


def seconds(network: nn.Module, images: Tensor) -> float:
    """Time of one forward pass."""
    start = time.perf_counter()
    network(images)
    return time.perf_counter() - start

"""What re-parameterizing and fusing a trained network saves, and that it changes no prediction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from replknet.analysis.flops import CLASSIFICATION, count_operations
from replknet.analysis.timing import interleave
from replknet.deploy import Equivalence, compare, fuse, reparameterize
from replknet.deploy.equivalence import size

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
    calls = {
        (name, many): partial(network, images[: batch if many else 1])
        for name, network in networks.items()
        for many in (False, True)
    }
    times = interleave(calls, ROUNDS)
    figures = []
    for name, network in networks.items():
        sizes = size(network)
        figures.append(
            FormFigures(
                name=name,
                parameters=sizes.parameters,
                convolutions=sizes.convolutions,
                norms=sizes.norms,
                flops=CLASSIFICATION.total(count_operations(network, images[:1])),
                single=median(times[name, False]),
                batch=median(times[name, True]),
            )
        )
    return Deployment(
        forms=tuple(figures),
        equivalence=compare(model, networks["and fused"], images),
        images=len(images),
        batch=min(batch, len(images)),
        threads=torch.get_num_threads(),
    )

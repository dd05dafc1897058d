"""Time the training step of whole networks in several engines, side by side in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from replknet.analysis.benchmark_networks import NetworkBenchmarkConfig, NetworkCase, Prepared
from replknet.analysis.flops import count_flops
from replknet.analysis.train_engines import TrainEngine, train_engines
from replknet.analysis.train_split import time_split
from replknet.engine.allocator import keep_freed_memory
from replknet.engine.config import OptimizerConfig
from replknet.engine.optimizer import create_optimizer

REFERENCE = "pytorch nchw"
LARGEST_DIFFERENCE = 0.1
"""Of an engine's gradient from PyTorch's, relative to its norm; more is another function.

Rounding moves some activations over the kink of their ReLU, each with its share of the gradient:
PyTorch's own two memory formats differ by 1 to 4 %.
"""


@dataclass(frozen=True)
class TrainBenchmarkConfig(NetworkBenchmarkConfig):
    """What to time, see ``NetworkBenchmarkConfig``; torch.compile only runs when it is named."""

    batch_sizes: tuple[int, ...] = (4,)
    rounds: int = 5
    max_seconds: float = 60.0

    @classmethod
    def known_engines(cls) -> Mapping[str, TrainEngine]:
        return train_engines()

    def default_engines(self) -> Sequence[str]:
        return [REFERENCE, "pytorch channels_last", "replknet"]

    def case(self, batch_size: int, image_size: tuple[int, int]) -> TrainCase:
        return TrainCase(batch_size, image_size)


@dataclass(frozen=True)
class TrainCase(NetworkCase):
    """One step on a batch of images: forward, cross entropy, backward, AdamW.

    Without stochastic depth, so that all engines compute the same gradient.
    """

    def __str__(self) -> str:
        return f"training step, {super().__str__()}"

    def prepare(self, model: str, engines: Sequence[str], rounds: int) -> Iterator[Prepared]:
        network = self.build(model)
        # The products of the forward pass, and as many again for each of the two gradients.
        operations = 3 * 2 * count_flops(network, self.image().shape)
        reference = gradient(*self._start(network, REFERENCE), self.labels())
        for engine in engines:
            trained, image = self._start(network, engine)
            difference = 0.0
            if engine != REFERENCE:
                difference = relative(gradient(trained, image, self.labels()), reference)
            if not difference <= LARGEST_DIFFERENCE:
                raise RuntimeError(
                    f"the gradient of {model} in {engine} differs by {difference:.1e} of its norm"
                )
            call = training_step(trained, image, self.labels())
            call(), call()  # until then memory is new: what the optimizer keeps, and all maps
            split = {} if "compile" in engine else time_split(call)  # it has operators no more
            yield Prepared(engine, call, operations, difference, split)

    def call(self, model: str, engine: str) -> Callable[[], None]:
        trained, image = self._start(self.build(model), engine)
        return training_step(trained, image, self.labels())

    def build(self, model: str, **options: Any) -> nn.Module:
        network = super().build(model, **options).train()
        for module in network.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        return network

    def labels(self) -> Tensor:
        """A class for each image; there are two, which any classifier has."""
        return torch.arange(self.batch_size) % 2

    def _start(self, network: nn.Module, engine: str) -> tuple[nn.Module, Tensor]:
        keep_freed_memory()  # as in training
        return train_engines()[engine].prepare(network, self.image())


def training_step(network: nn.Module, image: Tensor, labels: Tensor) -> Callable[[], None]:
    """Call that takes one step of AdamW, as ``replknet train`` takes it.

    The learning rate is too small to learn by: the gradients must not vanish over the calls.
    """
    optimizer = create_optimizer(network, OptimizerConfig(lr=1e-8, layer_decay=None))

    def step() -> None:
        F.cross_entropy(network(image), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gradient(network: nn.Module, image: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradient of the loss by each parameter; the parameters keep none."""
    loss = F.cross_entropy(network(image), labels)
    return list(torch.autograd.grad(loss, list(network.parameters())))


def relative(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference of all tensors, in units of the norm of those expected."""
    pairs = zip(tensors, expected, strict=True)
    difference = sum((a - b).double().square().sum().item() for a, b in pairs)
    return (difference / sum(b.double().square().sum().item() for b in expected)) ** 0.5

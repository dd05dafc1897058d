"""What the engine asks of a task; classification, segmentation and detection each provide it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made; the same options always give the same batches in the same order.

    ``batch_size`` is that of one process. Every random choice of sample ``index`` in ``epoch`` is a
    function of (``seed``, ``epoch``, ``index``), never of the process, worker or position, so a
    run can resume in the middle of an epoch, or on another number of processes.
    """

    batch_size: int
    seed: int = 0
    workers: int = 0
    rank: int = 0
    world_size: int = 1


class TrainLoader(Protocol):
    """Batches of one epoch at a time."""

    def __len__(self) -> int:
        """Batches of one process in an epoch; equal on every process."""
        ...

    def epoch(self, epoch: int, *, skip: int = 0) -> Iterable[Any]:
        """Batches of ``epoch``, without the first ``skip`` (which are not even read)."""
        ...


class Evaluator(Protocol):
    """Accumulates a metric over batches, each sample counted exactly once over all processes."""

    def update(self, model: nn.Module, batch: Any) -> None: ...

    def compute(self) -> dict[str, Any]:
        """Metrics over all processes, JSON-serialisable; collective when distributed."""
        ...


class Task(Protocol):
    """Model, data, loss and metric of one kind of problem."""

    primary_metric: str  # key of Evaluator.compute(); higher is better

    def build_model(self) -> nn.Module: ...

    def train_loader(self, options: LoaderOptions) -> TrainLoader: ...

    def eval_loader(self, options: LoaderOptions) -> Iterable[Any]: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss of a batch that ``train_loader`` made, already on the model's device."""
        ...

    def evaluator(self) -> Evaluator: ...

    def describe(self) -> str:
        """Model, weights it starts from, and data, in a line for people."""
        ...

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint must carry to be usable alone: task, model, classes, preprocessing."""
        ...

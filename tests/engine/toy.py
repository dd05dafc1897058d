"""A task small enough to be trained to its end many times in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replknet.engine.config import TrainConfig
from replknet.tasks.task import LoaderOptions

CLASSES = 4
SIZE = 8


@dataclass(frozen=True)
class ToyConfig:
    samples: int = 48
    eval_samples: int = 21
    dropout: float = 0.0
    batch_norm: bool = False
    nan_at: int | None = None  # sample whose image is NaN
    classes: tuple[str, ...] = tuple("abcd")
    mean: float = 0.0


@dataclass(frozen=True)
class ToyTrainConfig(TrainConfig):
    data: ToyConfig = field(default_factory=ToyConfig)

    def build_task(self) -> ToyTask:
        return ToyTask(self.data)


class ToyModel(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if config.batch_norm else nn.GroupNorm(2, 6)
        self.drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(6, CLASSES)
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        return lambda name: ("stem", "norm", "head").index(name.split(".")[0])

    def forward(self, images: Tensor) -> Tensor:
        features = F.gelu(self.norm(self.stem(images)))
        return self.head(self.drop(features.mean((2, 3))))


def sample(index: int, epoch: int, seed: int, mean: float) -> tuple[Tensor, Tensor]:
    """Image and label of ``index``, the image jittered anew in each epoch."""
    label = index % CLASSES
    fixed = np.random.default_rng([7, index]).normal(mean, 1, (3, SIZE, SIZE))
    jitter = np.random.default_rng([seed, epoch, index]).normal(0, 0.1, (3, SIZE, SIZE))
    fixed[label % 3, : 2 + label] += 1.5
    return torch.tensor(fixed + jitter, dtype=torch.float32), torch.tensor(label)


class ToyTrainLoader:
    def __init__(self, config: ToyConfig, options: LoaderOptions) -> None:
        self.config, self.options = config, options
        self.read = 0

    def __len__(self) -> int:
        return self.config.samples // (self.options.batch_size * self.options.world_size)

    def epoch(self, epoch: int, *, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        options, config = self.options, self.config
        order = np.random.default_rng([options.seed, epoch]).permutation(config.samples)
        own = order[options.rank :: options.world_size]
        for number in range(skip, len(self)):
            chosen = own[number * options.batch_size : (number + 1) * options.batch_size]
            pairs = [sample(int(index), epoch, options.seed, config.mean) for index in chosen]
            images = torch.stack([image for image, _ in pairs])
            for row, index in enumerate(chosen):
                if index == config.nan_at:
                    images[row] = torch.nan
            yield images, torch.stack([label for _, label in pairs])


class ToyEvaluator:
    def __init__(self) -> None:
        self.right_and_seen = torch.zeros(2)

    def update(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        right = (model(images).argmax(1) == labels).sum()
        self.right_and_seen += torch.stack([right, torch.tensor(len(labels))])

    def compute(self) -> dict[str, Any]:
        total = self.right_and_seen.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        right, seen = total.tolist()
        return {"top1": right / seen, "samples": int(seen)}


class ToyTask:
    primary_metric = "top1"

    def __init__(self, config: ToyConfig) -> None:
        self.config = config

    def build_model(self) -> nn.Module:
        return ToyModel(self.config)

    def train_loader(self, options: LoaderOptions) -> ToyTrainLoader:
        return ToyTrainLoader(self.config, options)

    def eval_loader(self, options: LoaderOptions) -> list[tuple[Tensor, Tensor]]:
        indices = range(options.rank, self.config.eval_samples, options.world_size)
        pairs = [sample(1000 + index, 0, 0, self.config.mean) for index in indices]
        return [
            (torch.stack([image for image, _ in part]), torch.stack([label for _, label in part]))
            for part in (
                pairs[start : start + options.batch_size]
                for start in range(0, len(pairs), options.batch_size)
            )
        ]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def evaluator(self) -> ToyEvaluator:
        return ToyEvaluator()

    def describe(self) -> str:
        return f"a toy on {self.config.samples} [samples]"

    def metadata(self) -> dict[str, Any]:
        return {"task": "toy", "class_names": self.config.classes}

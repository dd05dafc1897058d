"""Typed configuration of a training run; what cannot work is refused before anything starts."""

from __future__ import annotations

import json
import os
import reprlib
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from replknet.tasks.task import Task

PATHS = ("data.root", "model.checkpoint")  # settings that name a file or folder


@dataclass(frozen=True)
class BatchConfig:
    """Batch of one optimizer step, whatever the number of processes.

    Args:
        total: samples of one optimizer step over all processes and accumulated passes.
        max_per_process: most samples that one process holds at once; gradients are accumulated
            over as many passes as that takes. Null means one pass.
    """

    total: int = 32
    max_per_process: int | None = None

    def __post_init__(self) -> None:
        require(self.total >= 1, f"batch.total must be at least 1, got {self.total}")
        require(
            self.max_per_process is None or self.max_per_process >= 1,
            f"batch.max_per_process must be at least 1, got {self.max_per_process}",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; parameters with one dimension (biases, norms) are not decayed.

    Args:
        lr: peak learning rate, taken as it is (never scaled by the batch size).
        weight_decay: decoupled weight decay.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        layer_decay: factor of the learning rate from one layer group to the one below; null = off.
        clip_grad: largest gradient norm; null = no clipping.
    """

    lr: float = 1e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layer_decay: float | None = 0.8
    clip_grad: float | None = 5.0

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr must be positive, got {self.lr}")
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay must not be negative, got {self.weight_decay}",
        )
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas must lie in [0, 1), got {self.betas}",
        )
        require(self.eps > 0, f"optimizer.eps must be positive, got {self.eps}")
        require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"optimizer.layer_decay must lie in (0, 1], got {self.layer_decay}; null turns it off",
        )
        require(
            self.clip_grad is None or self.clip_grad > 0,
            f"optimizer.clip_grad must be positive, got {self.clip_grad}; null turns it off",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up from 0, then half a cosine down to ``min_lr``, per optimizer step.

    Args:
        epochs: passes over the data, warm-up included.
        warmup_epochs: of these, epochs of warm-up.
        min_lr: learning rate that the cosine approaches.
    """

    epochs: int = 20
    warmup_epochs: int = 1
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"schedule.epochs must be at least 1, got {self.epochs}")
        require(
            0 <= self.warmup_epochs < self.epochs,
            f"schedule.warmup_epochs must lie in [0, schedule.epochs), got {self.warmup_epochs} "
            f"of {self.epochs} epochs",
        )
        require(self.min_lr >= 0, f"schedule.min_lr must not be negative, got {self.min_lr}")


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the weights, evaluated and saved in their place.

    Args:
        decay: share of the old average kept at each step; null = no average.
        warmup: let the decay grow with the step, for runs that are short against 1 / (1 - decay).
    """

    decay: float | None = None
    warmup: bool = False

    def __post_init__(self) -> None:
        require(
            self.decay is None or 0 < self.decay < 1,
            f"ema.decay must lie in (0, 1), got {self.decay}; null turns the average off",
        )


@dataclass(frozen=True)
class ExecutionConfig:
    """How the machine computes a step; a run may be continued with another one.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        precision: dtype of the products; weights stay float32.
        compile: torch.compile backend such as "inductor"; null = eager.
        channels_last: memory format of model and images.
        grad_checkpointing: recompute activations in the backward pass to save memory.
        sync_bn: BatchNorm statistics over all processes.
    """

    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: str | None = None
    channels_last: bool = True
    grad_checkpointing: bool = False
    sync_bn: bool = True

    def __post_init__(self) -> None:
        if self.compile is not None and self.compile not in compile_backends(debug=True):
            raise ValueError(
                f"execution.compile must be one of {', '.join(compile_backends())}, or null for "
                f"none, got {self.compile!r}"
            )


def compile_backends(*, debug: bool = False) -> list[str]:
    """Backends of torch.compile, also those for debugging if asked."""
    return torch.compiler.list_backends(() if debug else ("debug", "experimental"))


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it writes.

    Args:
        directory: run directory; one that holds the same run continues it.
        overwrite: start afresh, deleting the run that the directory holds.
        seed: every random choice follows from it.
        workers: data-loading processes of each training process.
        eval_every: epochs between evaluations; 0 = never.
        log_every: optimizer steps between lines of ``metrics.jsonl``.
        checkpoint_minutes: most minutes of work that a kill can lose; null = epochs only.
        checkpoint_steps: optimizer steps between checkpoints, beside the above.
        progress: show a progress bar.
    """

    directory: str = "runs/finetune"
    overwrite: bool = False
    seed: int = 0
    workers: int = 2
    eval_every: int = 1
    log_every: int = 1
    checkpoint_minutes: float | None = 10.0
    checkpoint_steps: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        require(bool(self.directory), "run.directory must not be empty")
        require(self.seed >= 0, f"run.seed must not be negative, got {self.seed}")
        require(self.workers >= 0, f"run.workers must not be negative, got {self.workers}")
        require(self.eval_every >= 0, f"run.eval_every must not be negative, got {self.eval_every}")
        require(self.log_every >= 1, f"run.log_every must be at least 1, got {self.log_every}")
        require(
            self.checkpoint_minutes is None or self.checkpoint_minutes > 0,
            f"run.checkpoint_minutes must be positive, got {self.checkpoint_minutes}",
        )
        require(
            self.checkpoint_steps is None or self.checkpoint_steps >= 1,
            f"run.checkpoint_steps must be at least 1, got {self.checkpoint_steps}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """What every kind of training shares; each task adds its own sections in a subclass."""

    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(
            self.schedule.min_lr <= self.optimizer.lr,
            f"schedule.min_lr {self.schedule.min_lr} exceeds optimizer.lr {self.optimizer.lr}",
        )

    def build_task(self) -> Task:
        """Task that the sections of the subclass describe."""
        raise NotImplementedError("a TrainConfig is trained through a subclass that builds a task")

    def concern(self) -> str | None:
        """What to warn of when a run starts that may not be what was meant; None if nothing."""
        return None


def plain(config: TrainConfig) -> dict[str, Any]:
    """``config`` as nested dicts, lists and scalars, as YAML and JSON have them."""
    return json.loads(json.dumps(asdict(config), default=str))


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """What makes a run this run, flat (``{"optimizer.lr": 4e-3, ...}``), out of ``plain(config)``.

    How often it is written down, how the machine computes it and how many corrupt images are
    tolerated may change from one launch to the next; everything else may not. Two spellings of a
    path are one.
    """
    free = {"execution", "run"}
    kept = {section: value for section, value in values.items() if section not in free}
    kept["run"] = {"seed": values["run"]["seed"]}
    flat = flatten(kept)
    flat.pop("batch.max_per_process")
    flat.pop("data.max_corrupt_fraction", None)
    for name in PATHS:
        if flat.get(name) is not None:
            flat[name] = os.path.abspath(os.path.expanduser(flat[name]))
    return flat


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(before: dict[str, Any], now: dict[str, Any], *, words: str) -> list[str]:
    """Where two flat dicts differ, each key with both values.

    Args:
        before: One of the two.
        now: The other.
        words: How the values are presented, such as "{} there, {} asked".
    """
    return [
        _difference(key, before.get(key), now.get(key), words)
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _difference(key: str, before: Any, now: Any, words: str) -> str:
    """``key`` and both values; of long lists, the first that differ."""
    if not (isinstance(before, list) and isinstance(now, list)):
        return f"{key} ({words.format(repr(before), repr(now))})"
    if reprlib.repr(before) == reprlib.repr(now):
        pairs = enumerate(zip(before, now, strict=False))
        same = next((at for at, (a, b) in pairs if a != b), min(len(before), len(now)))
        key, before, now = f"{key}[{same}:]", before[same:], now[same:]
    return f"{key} ({words.format(reprlib.repr(before), reprlib.repr(now))})"


def split_batch(config: BatchConfig, world_size: int) -> tuple[int, int]:
    """Batch of one process and number of accumulated passes that make up ``config.total``.

    Raises:
        ValueError: the total cannot be split evenly over the processes.
    """
    share, rest = divmod(config.total, world_size)
    require(
        share > 0 and rest == 0,
        f"batch.total {config.total} does not divide over {world_size} processes; "
        f"use a multiple of {world_size}",
    )
    largest = min(share, config.max_per_process or share)
    batch_size = max(size for size in range(1, largest + 1) if share % size == 0)
    return batch_size, share // batch_size


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)

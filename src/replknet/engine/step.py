"""One optimizer step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from replknet.engine.batches import to_device
from replknet.engine.checkpoint import TrainState
from replknet.engine.config import TrainConfig
from replknet.engine.distributed import Processes
from replknet.engine.precision import autocast
from replknet.engine.schedule import learning_rate, set_learning_rate
from replknet.models.writing import write_whole
from replknet.tasks.task import Task


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a metric is NaN or infinite; no checkpoint was overwritten."""


WAY_OUT = (
    "Start a new run with a lower optimizer.lr, a longer warm-up, optimizer.clip_grad, or "
    "execution.precision float32"
)


@dataclass(frozen=True)
class Step:
    """What a step did: mean loss over the total batch, learning rate, gradient norm."""

    loss: float
    lr: float
    grad_norm: float
    stop: bool  # some process was asked to stop


class Stepper:
    """Takes optimizer steps on ``state``.

    Args:
        network: ``state.model`` as it is called: wrapped for DDP, compiled.
        nonfinite: directory for the batches of a step that is not finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        state: TrainState,
        network: nn.Module,
        processes: Processes,
        nonfinite: Path,
    ) -> None:
        self.config, self.task, self.state = config, task, state
        self.network, self.processes, self.nonfinite = network, processes, nonfinite
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]

    def take(self, batches: list[Any], steps_per_epoch: int, *, stop: Callable[[], bool]) -> Step:
        """Accumulate the gradients of ``batches``, step, and average the weights; collective.

        Raises:
            NonFiniteError: the loss, or an unscaled gradient, is not finite; the batches are saved.
        """
        config, state = self.config, self.state
        seed_everything(config.run.seed, state.step + 1, self.processes.rank)
        rate = learning_rate(state.step, config.optimizer.lr, config.schedule, steps_per_epoch)
        set_learning_rate(state.optimizer, rate)

        own_loss = self._accumulate(batches)
        figures = torch.stack([own_loss, own_loss.new_tensor(float(stop()))])
        loss, stopping = self.processes.mean(figures).tolist()
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss is {loss}", batches, own_loss.item())

        state.scaler.unscale_(state.optimizer)
        largest = config.optimizer.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, largest).item()
        if not math.isfinite(norm) and not state.scaler.is_enabled():
            raise self._not_finite(f"the gradient norm is {norm}", batches, own_loss.item())
        state.scaler.step(state.optimizer)  # skips the step if float16 gradients overflowed
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.model, state.step if config.ema.warmup else None)
        return Step(loss, rate, norm, stopping > 0)

    def _accumulate(self, batches: list[Any]) -> torch.Tensor:
        """Gradients of the mean loss over ``batches``; that loss, of this process."""
        execution, device = self.config.execution, self.processes.device
        total = torch.zeros((), device=device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with self._without_reduction() if not last else nullcontext():
                with autocast(execution, device):
                    loss = self.task.loss(self.network, to_device(batch, device, execution))
                loss = loss / len(batches)
                self.state.scaler.scale(loss).backward()
            total += loss.detach().float()
        return total

    def _without_reduction(self):
        """Context in which DDP keeps gradients to itself until the last pass of a step."""
        if isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return nullcontext()

    def _not_finite(self, what: str, batches: list[Any], own_loss: float) -> NonFiniteError:
        step, rank = self.state.step, self.processes.rank
        self.state.optimizer.zero_grad(set_to_none=True)
        path = self.nonfinite / f"step{step}-process{rank}.pt"
        self.nonfinite.mkdir(parents=True, exist_ok=True)
        content = {"step": step, "loss": own_loss, "batches": batches}
        write_whole(path, lambda partial: torch.save(content, partial))
        return NonFiniteError(
            f"{what} at step {step}; its batches are in {path} and no checkpoint was overwritten. "
            f"{WAY_OUT}"
        )


def seed_everything(*entropy: int) -> None:
    """Seed every global generator from a few integers."""
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002  (timm's Mixup draws from the global generator)
    torch.manual_seed(int(words[2]))

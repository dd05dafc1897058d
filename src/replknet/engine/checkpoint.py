"""The state of a run at an optimizer step, and its files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from replknet.engine.config import differences, flatten
from replknet.models.writing import write_whole

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that the next step depends on.

    Random choices are functions of (seed, step, process), so no generator is part of it.

    Attributes:
        step: optimizer steps done; it also says the epoch and the position in it.
        finished_epochs: epochs whose evaluation, if one was due, is done too.
        best: metric, epoch and value of the best evaluation so far.
        evaluation: metrics of the last evaluation.
    """

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: Optimizer
    scaler: GradScaler
    step: int = 0
    finished_epochs: int = 0
    best: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged model if there is one, else the trained one."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it loads without unpickling objects."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "finished_epochs": self.finished_epochs,
            "best": self.best,
            "evaluation": self.evaluation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.finished_epochs = state["finished_epochs"]
        self.best = state["best"]
        self.evaluation = state["evaluation"]


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Write ``state.pt`` and keep the one before it as ``state.previous.pt``.

    At every moment one of the two is whole.

    Raises:
        OSError: it cannot be written; the earlier files are as they were.
    """
    current, complete = directory / "state.pt", directory / "state.new.pt"

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:  # a file object: its OSError tells the cause
            torch.save(state, file)

    write_whole(complete, write)
    if current.exists():
        current.replace(directory / "state.previous.pt")
    complete.replace(current)


def read_state(directory: Path) -> dict[str, Any] | None:
    """Newest readable state of a run, on the CPU; None if it has not saved any yet.

    Raises:
        ValueError: there are state files and none can be read.
    """
    unreadable = []
    for path in (directory / "state.pt", directory / "state.previous.pt"):
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged archive makes torch raise
            unreadable.append(f"{path.name}: {str(error).splitlines()[0]}")
            continue
        for reason in unreadable:
            logger.warning("continuing from the checkpoint before a damaged one (%s)", reason)
        return state
    if unreadable:
        raise ValueError(
            f"no checkpoint in {directory} can be read ({'; '.join(unreadable)}); start afresh "
            "with --run.overwrite true or another run.directory"
        )
    return None


def refuse_other_data(directory: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if a run was trained on something else than it would be ``now``.

    Args:
        directory: of the run.
        saved: its state; one of an earlier version does not say what it was trained on.
        now: plain values, as ``saved["trained_on"]``.
    """
    before = saved.get("trained_on", {})
    known = {key: now.get(key) for key in before}
    different = differences(flatten(before), flatten(known), words="{} then, {} now")
    if different:
        raise ValueError(
            f"the data or the model of {directory} have changed since its last checkpoint: "
            f"{', '.join(different)}; restore them, choose another --run.directory, or delete "
            "that run with --run.overwrite true"
        )

"""Measuring a model on the validation data of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from replknet.engine.batches import to_device
from replknet.engine.config import ExecutionConfig
from replknet.engine.distributed import Processes
from replknet.engine.precision import autocast
from replknet.tasks.task import Task


class EvaluationStopped(Exception):
    """Evaluation was left before its end because a stop was asked for."""


def evaluate(
    model: nn.Module,
    task: Task,
    loader: Iterable[Any],
    execution: ExecutionConfig,
    processes: Processes,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Metrics of ``model`` over ``loader``, every sample counted once over all processes.

    The model is evaluated in evaluation mode and left in the mode it was in. ``stop`` is asked
    after each batch; collective when distributed.

    Raises:
        EvaluationStopped: ``stop`` said so on any process.
    """
    processes.broadcast_buffers(model)
    evaluator = task.evaluator()
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in loader:
                if stop():
                    break
                with autocast(execution, processes.device):
                    evaluator.update(model, to_device(batch, processes.device, execution))
            if processes.any(stop()):
                raise EvaluationStopped
            return evaluator.compute()
    finally:
        model.train(training)

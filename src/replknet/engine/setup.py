"""From a configuration to the model, optimizer and loss scaling of a run."""

from __future__ import annotations

import logging
from typing import cast

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from replknet.engine.batchnorm import SynchronizedBatchNorm2d, synchronize
from replknet.engine.checkpoint import TrainState
from replknet.engine.config import ExecutionConfig, TrainConfig
from replknet.engine.distributed import Processes
from replknet.engine.optimizer import create_optimizer
from replknet.engine.precision import grad_scaler
from replknet.tasks.task import Task

logger = logging.getLogger(__name__)


def create_state(config: TrainConfig, task: Task, processes: Processes) -> TrainState:
    """State of a run before its first step, on the device of this process."""
    model = task.build_model()
    if config.execution.sync_bn and processes.world_size > 1:
        model = synchronize_batchnorm(model, processes)
    model.to(processes.device)
    if config.execution.channels_last:
        use_channels_last(model)
    if config.execution.grad_checkpointing:
        enable_grad_checkpointing(model)
    model.train()
    ema = None
    if config.ema.decay is not None:
        ema = ModelEmaV3(model, decay=config.ema.decay, use_warmup=config.ema.warmup)
    optimizer = create_optimizer(model, config.optimizer)
    return TrainState(model, ema, optimizer, grad_scaler(config.execution, processes.device))


def use_channels_last(model: nn.Module) -> None:
    """Store the filters of ``model`` channels last, but for those of one channel.

    Depthwise filters lie in memory the same way in both formats, and DDP complains of gradients
    whose strides differ from theirs in name.
    """
    for parameter in model.parameters():
        if parameter.ndim == 4 and parameter.shape[1] > 1:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def synchronize_batchnorm(model: nn.Module, processes: Processes) -> nn.Module:
    """``model``, its batch norms with the statistics of all processes."""
    if processes.device.type == "cuda":
        return convert_sync_batchnorm(model)
    synchronize(model)
    others = {
        type(layer).__name__
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SynchronizedBatchNorm2d)
    }
    if processes.main and others:
        logger.warning(
            "execution.sync_bn on the CPU is for nn.BatchNorm2d only: in %s every process "
            "normalises with the statistics of its own batch",
            ", ".join(sorted(others)),
        )
    return model


def enable_grad_checkpointing(model: nn.Module) -> None:
    """Turn on gradient checkpointing through timm's model interface.

    Raises:
        ValueError: the model does not offer it.
    """
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ValueError(
            f"{type(model).__name__} has no gradient checkpointing; set "
            "execution.grad_checkpointing to false"
        )
    switch(True)


def wrap(model: nn.Module, execution: ExecutionConfig, processes: Processes) -> nn.Module:
    """``model`` as the training step calls it: compiled, gradients averaged over processes."""
    network = model
    if execution.compile is not None:
        network = cast(nn.Module, torch.compile(model, backend=execution.compile))
    if processes.world_size > 1:
        device_ids = [processes.device] if processes.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=device_ids)
    return network

"""AdamW with the published parameter groups."""

from __future__ import annotations

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from replknet.engine.config import OptimizerConfig


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW over the trainable parameters of ``model``; layer decay is each group's ``lr_scale``.

    Raises:
        ValueError: layer decay on a model that does not say which layers it has.
    """
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ValueError(
            f"optimizer.layer_decay needs a model with group_matcher(), {type(model).__name__} has "
            "none; set optimizer.layer_decay to null"
        )
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        betas=tuple(config.betas),
        eps=config.eps,
        fused=True,
    )

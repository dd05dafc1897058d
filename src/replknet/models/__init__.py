"""The RepLKNet family, its variants and its checkpoints."""

from replknet.models.checkpoint import (
    Checkpoint,
    CheckpointReport,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from replknet.models.factory import create_model, list_models
from replknet.models.replknet import RepLKNet

__all__ = [
    "Checkpoint",
    "CheckpointReport",
    "RepLKNet",
    "create_model",
    "list_models",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]

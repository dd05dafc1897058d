"""The RepLKNet family, its variants and its checkpoints."""

from replknet.models.factory import create_model, list_models
from replknet.models.replknet import RepLKNet

__all__ = ["RepLKNet", "create_model", "list_models"]

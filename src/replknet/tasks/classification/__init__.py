"""Image classification: data, training batches, loss, metrics."""

from replknet.tasks.classification.datasets import DataConfig, open_dataset
from replknet.tasks.classification.preprocessing import Augmentation, Preprocessing
from replknet.tasks.classification.task import (
    ClassificationConfig,
    ClassificationTask,
    ModelConfig,
)

__all__ = [
    "Augmentation",
    "ClassificationConfig",
    "ClassificationTask",
    "DataConfig",
    "ModelConfig",
    "Preprocessing",
    "open_dataset",
]

"""Training and measuring classifiers; the defaults fine-tune on a user's own images."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from replknet.engine.config import BatchConfig, ExecutionConfig, TrainConfig
from replknet.engine.distributed import join_processes
from replknet.engine.evaluate import evaluate
from replknet.models import read_checkpoint
from replknet.tasks.classification.classifier import load_classifier
from replknet.tasks.classification.datasets import DataConfig, split_of
from replknet.tasks.classification.preprocessing import Augmentation, Preprocessing
from replknet.tasks.classification.task import (
    ClassificationConfig,
    ClassificationTask,
    ModelConfig,
)
from replknet.tasks.task import LoaderOptions

logger = logging.getLogger(__name__)

GENTLE = Augmentation(
    scale=(0.35, 1.0),
    color_jitter=0.2,
    auto_augment=None,
    re_prob=0.0,
    mixup=0.0,
    cutmix=0.0,
)
SMALL = BatchConfig(total=32, max_per_process=16)


@dataclass(frozen=True, kw_only=True)
class ClassificationTrainConfig(TrainConfig):
    """What to train on what, and how.

    Args:
        model: the network.
        data: the images.
        preprocessing: how an image becomes an input; travels in the checkpoint.
        augmentation: random changes of the training images.
        loss: "cross_entropy", or "bce" for binary cross-entropy of each class.
        batch: batch of one optimizer step.
        optimizer: AdamW.
        schedule: learning rate over time.
        ema: average of the weights.
        execution: how the machine computes; a run may be continued with another one.
        run: where the run lives and what it writes.
    """

    data: DataConfig
    preprocessing: Preprocessing  # no default: its crop would not follow another input size
    model: ModelConfig = field(default_factory=ModelConfig)
    augmentation: Augmentation = GENTLE
    batch: BatchConfig = SMALL
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"

    def build_task(self) -> ClassificationTask:
        """The task of the sections above."""
        return ClassificationTask(
            ClassificationConfig(
                model=self.model,
                data=self.data,
                preprocessing=self.preprocessing,
                augmentation=self.augmentation,
                loss=self.loss,
            )
        )

    def concern(self) -> str | None:
        """Random weights with layer decay, which keeps what lower layers know: for fine-tuning."""
        if self.model.checkpoint is not None or self.optimizer.layer_decay is None:
            return None
        return (
            "training from random weights; give --model.checkpoint to fine-tune a published model"
        )


@dataclass(frozen=True, kw_only=True)
class ClassificationEvalConfig:
    """What to measure a checkpoint on.

    Args:
        checkpoint: any file that ``load_checkpoint`` knows; averaged weights if it has them.
        data: the images.
        model: variant with its tag, such as "replknet_31b.in1k_384", of a file that does not say.
        input_size: another size than the model's own, by the published rules.
        batch_size: images of one process at a time.
        workers: data-loading processes of each process.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        precision: dtype of the products.
    """

    checkpoint: Path
    data: DataConfig
    model: str | None = None
    input_size: int | None = None
    batch_size: int = 32
    workers: int = 2
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"


def evaluate_classifier(config: ClassificationEvalConfig) -> dict[str, Any] | None:
    """Metrics of a checkpoint on validation images, each counted once over all processes.

    Call it in every process; all but the main one get None.

    Raises:
        ValueError: the file cannot be used, or its classes are not those of the data.
        FileNotFoundError: there is no such file.
    """
    execution = ExecutionConfig(device=config.device, precision=config.precision)
    with join_processes(execution.device) as processes:
        classifier = load_classifier(
            config.checkpoint,
            model=config.model,
            input_size=config.input_size,
            device=processes.device,
        )
        task = ClassificationTask(
            ClassificationConfig(
                model=ModelConfig(),
                data=_held_out(config),
                preprocessing=classifier.preprocessing,
            ),
            class_names=classifier.class_names,
        )
        options = LoaderOptions(
            batch_size=config.batch_size,
            workers=config.workers,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        loader = task.eval_loader(options)
        metrics = evaluate(classifier.model, task, loader, execution, processes)
        return metrics if processes.main else None


def _held_out(config: ClassificationEvalConfig) -> DataConfig:
    """The data, split as in the training of the checkpoint unless another split is asked for."""
    trained, asked = read_checkpoint(config.checkpoint).metadata.get("split"), split_of(config.data)
    if trained is None or trained == asked:
        return config.data
    if asked == {name: getattr(DataConfig, name) for name in asked}:  # not said otherwise
        return replace(config.data, **trained)
    logger.warning(
        "%s was trained with the split %s, not %s: images that it was trained on may be among "
        "those that it is measured on",
        *(config.checkpoint, trained, asked),
    )
    return config.data

"""Image classification: model, data, loss and metric."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import sub
from typing import Any, Literal

import torch.nn.functional as F
from PIL.Image import Image
from timm.data import resolve_model_data_config
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from replknet.models import create_model, list_models
from replknet.models.checkpoint import CheckpointReport, read_checkpoint, read_replknet
from replknet.models.factory import stored_kwargs
from replknet.tasks.classification.datasets import (
    DataConfig,
    ImageDataset,
    Split,
    open_dataset,
    split_of,
)
from replknet.tasks.classification.loader import Batch, EvalLoader, TrainLoader
from replknet.tasks.classification.metrics import ClassificationEvaluator
from replknet.tasks.classification.preprocessing import Augmentation, Preprocessing
from replknet.tasks.task import LoaderOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """A model of this package or of timm.

    Args:
        name: such as "replknet_31b", or any model of timm.
        checkpoint: file with weights to start from; null = random weights.
        reset_head: leave out the classifier of the checkpoint and start a new one; null = only if
            its classes are not those of the data (by name, or by number where it has no names).
        num_classes: outputs; null = as many as the data has classes. Others stay unused.
        kwargs: arguments of the model's constructor, such as drop_path_rate.
    """

    name: str = "replknet_31b"
    checkpoint: str | None = None
    reset_head: bool | None = None
    num_classes: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, instead in (
            ("num_classes", "model.num_classes"),
            ("in_chans", "preprocessing.mean"),
        ):
            if name in self.kwargs:
                raise ValueError(f"model.kwargs must not hold {name!r}: it follows from {instead}")


@dataclass(frozen=True)
class ClassificationConfig:
    """Everything that defines a classification problem."""

    model: ModelConfig
    data: DataConfig
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    augmentation: Augmentation = field(default_factory=Augmentation)
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"


class ClassificationTask:
    """What the engine asks of a ``Task``, for images with one class each.

    ``class_names`` name the outputs of a model that exists already; the data set's classes are
    then matched with them by name. By default the outputs are the data set's classes in order.
    """

    primary_metric = "top1"

    def __init__(
        self, config: ClassificationConfig, *, class_names: Sequence[str] | None = None
    ) -> None:
        self.config = config
        self._model_names = None if class_names is None else tuple(class_names)

    @cached_property
    def train_data(self) -> ImageDataset:
        """Images to learn from."""
        return self._open("train")

    @cached_property
    def val_data(self) -> ImageDataset:
        """Images to evaluate on."""
        return self._open("val")

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """A name for each output of the model."""
        if self._model_names is not None:
            return self._model_names
        # Where classes are mere numbers, a split may lack the last ones.
        names = max(self.train_data.class_names, self.val_data.class_names, key=len)
        outputs = self.config.model.num_classes or len(names)
        if len(names) > outputs:
            raise ValueError(
                f"the data has {len(names)} classes, more than the {outputs} outputs of the model; "
                "leave model.num_classes out to have a head of the right size"
            )
        return names + tuple(f"unused {index}" for index in range(len(names), outputs))

    def build_model(self) -> nn.Module:
        """The model with one output for each class name."""
        config = self.config.model
        model = create_model(
            config.name,
            checkpoint=config.checkpoint,
            reset_head=self._starts_new_head(),
            **self._model_kwargs,
        )
        if config.checkpoint is not None:
            self._warn_of_other_normalisation(model)
        return model

    def train_loader(self, options: LoaderOptions) -> TrainLoader:
        """Batches with random changes; see ``TrainLoader``."""
        augmentation = self.config.augmentation
        return TrainLoader(
            self.train_data,
            augmentation.train_transform(self.config.preprocessing),
            options,
            mix=augmentation.mix(len(self.class_names)),
            max_corrupt_fraction=self.config.data.max_corrupt_fraction,
        )

    def eval_loader(self, options: LoaderOptions) -> EvalLoader:
        """Every validation image once; see ``EvalLoader``."""
        return EvalLoader(
            self.val_data,
            self.config.preprocessing.eval_transform(),
            options,
            max_corrupt_fraction=self.config.data.max_corrupt_fraction,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy, or binary cross-entropy of each class; labels smoothed, maybe mixed."""
        logits = model(batch["image"]).float()
        target, smoothing = batch["target"], self.config.augmentation.smoothing
        if self.config.loss == "bce":
            return BinaryCrossEntropy(smoothing)(logits, target)
        if target.is_floating_point():  # mixed, and smoothed in the mixing
            return F.cross_entropy(logits, target)
        return F.cross_entropy(logits, target, label_smoothing=smoothing)

    def evaluator(self) -> ClassificationEvaluator:
        """Accuracy and what else ``ClassificationEvaluator`` counts."""
        return ClassificationEvaluator(self.class_names, self.val_data.source)

    def describe(self) -> str:
        """Model, weights it starts from, images and input size, in a line."""
        model, size = self.config.model, self.config.preprocessing.input_size
        weights = f"from {model.checkpoint}" if model.checkpoint else "with random weights"
        train, val = self.train_data, self.val_data
        classes = max(len(train.class_names), len(val.class_names))
        return (
            f"{model.name} {weights}, {len(train)} training and {len(val)} validation images of "
            f"{classes} classes, {size}x{size}"
        )

    def metadata(self) -> dict[str, Any]:
        """Task, model, classes, preprocessing and what was held out, as a checkpoint stores it."""
        return {
            "task": "classification",
            "model": {"name": self.config.model.name, "kwargs": self._model_kwargs},
            "preprocessing": self.config.preprocessing.to_dict(),
            "class_names": list(self.class_names),
            "split": split_of(self.config.data),
        }

    @cached_property
    def _source(self) -> CheckpointReport | None:
        """What the file holds that the weights start from."""
        model = self.config.model
        if model.checkpoint is None:
            return None
        ours = model.name.split(".")[0] in list_models()
        return (read_replknet if ours else read_checkpoint)(model.checkpoint).report

    @cached_property
    def _model_kwargs(self) -> dict[str, Any]:
        """Arguments of the model: those of the file it starts from, of the configuration, and what
        the data needs."""
        model, inherited = self.config.model, {}
        if self._source is not None:
            inherited = stored_kwargs(self._source.metadata, model.name)
        needed = {
            "num_classes": len(self.class_names),
            "in_chans": self.config.preprocessing.channels,
        }
        return {**inherited, **model.kwargs, **needed}

    def _starts_new_head(self) -> bool:
        """Whether to leave out the classifier of the checkpoint; says so when it is a choice."""
        model = self.config.model
        report = self._source
        if model.reset_head is not None or report is None:
            return bool(model.reset_head)
        if report.form is None:
            return False
        names = report.metadata.get("class_names")
        if names is None:
            same = report.num_classes == len(self.class_names)
        else:
            same = tuple(names) == self.class_names
        if not same:
            logger.warning(
                "%s was trained for other classes (%s) than those of the data (%d): "
                "starting a new classifier on its features",
                *(model.checkpoint, report.num_classes or "none", len(self.class_names)),
            )
        return not same

    def _warn_of_other_normalisation(self, model: nn.Module) -> None:
        """Say so when the weights were trained on pixels of another mean or deviation."""
        ours, theirs = self.config.preprocessing, resolve_model_data_config(model)
        for name in ("mean", "std"):
            here, before = getattr(ours, name), tuple(theirs[name])
            if len(here) == len(before) and max(map(abs, map(sub, here, before))) > 1e-3:
                logger.warning(
                    "%s was trained with preprocessing.%s %s, and this run uses %s; for the same: "
                    "--preprocessing.%s '%s'",
                    *(self.config.model.checkpoint, name, list(before), list(here)),
                    *(name, list(before)),
                )

    def _open(self, split: Split) -> ImageDataset:
        mode = self.config.preprocessing.image_mode
        dataset = open_dataset(self.config.data, split, mode=mode)
        if self._model_names is None or dataset.class_names == self._model_names:
            return dataset
        return Renumbered(dataset, self._model_names)


class Renumbered:
    """A data set whose classes are a part of a model's, numbered as the model numbers them."""

    def __init__(self, dataset: ImageDataset, class_names: tuple[str, ...]) -> None:
        numbers = {name: number for number, name in enumerate(class_names)}
        unknown = [name for name in dataset.class_names if name not in numbers]
        if unknown:
            raise ValueError(
                f"the model does not know {len(unknown)} of the data's "
                f"{len(dataset.class_names)} classes, such as {', '.join(unknown[:5])}; "
                f"it knows {', '.join(class_names[:5])} and so on"
            )
        self.class_names = class_names
        self._dataset = dataset
        self._numbers = [numbers[name] for name in dataset.class_names]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        image, target = self._dataset[index]
        return image, self._numbers[target]

    def source(self, index: int) -> str:
        return self._dataset.source(index)

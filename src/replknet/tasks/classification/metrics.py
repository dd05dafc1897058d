"""Accuracy of a classifier over a data set that may be spread over processes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import (
    MulticlassConfusionMatrix,
    MulticlassStatScores,
)

from replknet.tasks.classification.loader import Batch

CONFUSION_MATRIX_CLASSES = 100  # above, a matrix is neither readable nor small
EXAMPLES = 16  # best and worst predictions that are kept


@dataclass(frozen=True, order=True)
class Example:
    """One prediction, ordered by how probable the model found the true class."""

    true_probability: float
    index: int
    target: int
    prediction: int
    probability: float


class ClassificationEvaluator:
    """Top-1, top-5, loss, scores per class, confusion matrix, best and worst predictions.

    ``source`` names the image at a place of the data set. Exact on any number of processes: sums
    are added up, nothing is averaged over processes.
    """

    def __init__(self, class_names: Sequence[str], source: Callable[[int], str]) -> None:
        self._class_names = class_names
        self._source = source
        classes = len(class_names)
        options: dict[str, Any] = {"num_classes": classes, "validate_args": False}
        self._scores = MetricCollection(
            {
                "counts": MulticlassStatScores(average=None, **options),
                "top5": MulticlassStatScores(average="micro", top_k=min(5, classes), **options),
            },
            compute_groups=False,
        )
        if classes <= CONFUSION_MATRIX_CLASSES:
            self._scores.add_metrics({"confusion_matrix": MulticlassConfusionMatrix(**options)})
        self._loss = MeanMetric(nan_strategy="disable")  # a NaN must be seen
        self._images, self._skipped = SumMetric(), SumMetric()
        self._best: list[Example] = []
        self._worst: list[Example] = []

    @torch.no_grad()
    def update(self, model: nn.Module, batch: Batch) -> None:
        """Predict a batch of ``EvalLoader`` and count it."""
        target = batch["target"]
        for metric in (self._scores, self._loss, self._images, self._skipped):
            metric.to(target.device)
        self._skipped.update(batch["skipped"])
        self._images.update(len(target))
        if not len(target):
            return
        logits = model(batch["image"]).float()
        self._loss.update(F.cross_entropy(logits, target, reduction="none"))
        self._scores.update(logits, target)
        self._keep_examples(logits.softmax(dim=1), target, batch["index"])

    def compute(self) -> dict[str, Any]:
        """Numbers at the top level, tables below it: see ``docs/data.md``."""
        images = int(self._images.compute())
        if images == 0:
            raise ValueError("nothing was evaluated: every image is corrupt or there is none")
        scores = self._scores.compute()
        result: dict[str, Any] = {
            "top1": 100 * int(scores["counts"][:, 0].sum()) / images,
            "top5": 100 * int(scores["top5"][0]) / images,
            "loss": float(self._loss.compute()),
            "images": images,
            "skipped": int(self._skipped.compute()),
            "per_class": self._per_class(scores["counts"]),
            "best": self._examples(self._best, largest=True),
            "worst": self._examples(self._worst, largest=False),
        }
        if "confusion_matrix" in scores:
            result["confusion_matrix"] = scores["confusion_matrix"].tolist()
        return result

    def _per_class(self, counts: Tensor) -> list[dict[str, Any]]:
        table = []
        for name, row in zip(self._class_names, counts.tolist(), strict=True):
            true_positive, false_positive, _, false_negative, support = row
            predicted = true_positive + false_positive
            table.append(
                {
                    "name": name,
                    "images": support,
                    "recall": _ratio(true_positive, support),
                    "precision": _ratio(true_positive, predicted),
                    "f1": _ratio(2 * true_positive, predicted + true_positive + false_negative),
                }
            )
        return table

    def _keep_examples(self, probabilities: Tensor, target: Tensor, index: Tensor) -> None:
        top, prediction = probabilities.max(dim=1)
        true = probabilities.gather(1, target[:, None]).squeeze(1)
        columns = (true, index, target, prediction, top)
        batch = [Example(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
        self._best = heapq.nlargest(EXAMPLES, self._best + batch)
        self._worst = heapq.nsmallest(EXAMPLES, self._worst + batch)

    def _examples(self, mine: list[Example], *, largest: bool) -> list[dict[str, Any]]:
        examples = mine
        if dist.is_available() and dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, mine)
            examples = [example for part in gathered for example in part]
        chosen = (heapq.nlargest if largest else heapq.nsmallest)(EXAMPLES, examples)
        return [{**asdict(example), "source": self._source(example.index)} for example in chosen]


def _ratio(part: float, whole: float) -> float | None:
    """``part / whole``, or None where there is nothing to divide."""
    return part / whole if whole else None

"""A run as one self-contained HTML page, for people who would rather look than read."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment
from PIL.Image import Image

from replknet.analysis import plots
from replknet.analysis.deployment import Deployment, measure_deployment
from replknet.engine.run_directory import RunDirectory
from replknet.models import create_model
from replknet.models.writing import write_whole
from replknet.tasks.classification.datasets import DataConfig, ImageDataset, open_dataset
from replknet.tasks.classification.decoding import CorruptImageError
from replknet.tasks.classification.preprocessing import Preprocessing

SHOWN_EXAMPLES = 12
MEASURED_IMAGES = 256
THUMBNAIL = 160  # pixels


@dataclass(frozen=True)
class Run:
    """What a training run wrote down."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """Record of the evaluation with the highest top-1, whose weights are ``best``."""
        return max(self.evaluations, key=lambda record: record["evaluation"]["top1"])


def read_run(directory: str | Path) -> Run:
    """Read a classification run that has been evaluated at least once.

    Raises:
        ValueError: the directory holds no run, or one without an evaluation.
    """
    run = RunDirectory(Path(directory))
    if not run.config.exists():
        raise ValueError(f"{run.root} holds no run (no config.yaml); pass a run.directory")
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    evaluations = [record for record in records if "evaluation" in record]
    if not evaluations:
        raise ValueError(f"{run.root} has not been evaluated yet; train at least one epoch")
    return Run(
        settings=yaml.safe_load(run.config.read_text(encoding="utf-8")),
        environment=json.loads(run.environment.read_text(encoding="utf-8")),
        steps=[record for record in records if "loss" in record],
        evaluations=evaluations,
    )


def write_report(directory: str | Path) -> Path:
    """Measure the best model of a classification run and write ``report.html`` beside it.

    Raises:
        ValueError: there is no run, no evaluation of it, or its data set is gone.
        OSError: the page cannot be written.
    """
    run = read_run(directory)
    preprocessing = Preprocessing(**run.settings["preprocessing"])
    data = open_dataset(DataConfig(**run.settings["data"]), "val", mode=preprocessing.image_mode)
    model = create_model(checkpoint=RunDirectory(Path(directory)).checkpoints / "best.safetensors")
    transform = preprocessing.eval_transform()
    inputs = torch.stack([transform(image) for image in readable(data, MEASURED_IMAGES)])
    page = render(run, measure_deployment(model, inputs), data)
    path = Path(directory) / "report.html"
    write_whole(path, lambda partial: partial.write_text(page, encoding="utf-8"))
    return path


def readable(data: ImageDataset, count: int) -> list[Image]:
    """The first ``count`` images that can be decoded, spread over the data set."""
    images = []
    for index in range(0, len(data), max(1, len(data) // count)):
        with contextlib.suppress(CorruptImageError):
            images.append(data[index][0])
    return images[:count]


def render(run: Run, deployment: Deployment, data: ImageDataset) -> str:
    """The page as text; ``data`` is the validation set, as it is now, that the run evaluated on."""
    best = run.best["evaluation"]
    class_names = [row["name"] for row in best["per_class"]]
    worst_examples, best_examples = (best[key][:SHOWN_EXAMPLES] for key in ("worst", "best"))
    sources = {example["source"] for example in (*worst_examples, *best_examples)}
    images = images_by_source(data, sources)
    matrix = best.get("confusion_matrix")
    environment = Environment(autoescape=True)
    environment.filters["percent"] = percent
    template = files("replknet.analysis").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=f"{run.settings['model']['name']} on {data_name(run)}",
        subtitle=f"Trained {run.environment['started']} on {run.environment['device']}.",
        figures=headline(run, deployment),
        curves=plots.learning_curves(run.steps, run.evaluations),
        deployment=deployment,
        per_class=best["per_class"],
        confusion=plots.confusion_matrix(matrix, class_names) if matrix else None,
        galleries=[
            (
                "Worst predictions",
                "Validation images whose true class the model found least probable.",
                [gallery_entry(example, class_names, images) for example in worst_examples],
            ),
            (
                "Best predictions",
                "Validation images whose true class the model found most probable.",
                [gallery_entry(example, class_names, images) for example in best_examples],
            ),
        ],
        pixelated=run.settings["preprocessing"]["input_size"] < 128,
        settings=yaml.safe_dump(run.settings, sort_keys=False),
        environment=yaml.safe_dump(run.environment, sort_keys=False),
    )


def data_name(run: Run) -> str:
    """The data set in a word or two."""
    data = run.settings["data"]
    return Path(data["root"]).name if data["root"] else "the shipped part of Fashion-MNIST"


def headline(run: Run, deployment: Deployment) -> list[tuple[str, str, str]]:
    """Label, value and remark of the figures at the top."""
    best, scores = run.best, run.best["evaluation"]
    trained, fused = deployment.forms[0], deployment.forms[-1]
    faster = trained.single / fused.single
    return [
        ("top-1", f"{scores['top1']:.2f} %", f"{scores['images']:,} images, epoch {best['epoch']}"),
        ("top-5", f"{scores['top5']:.2f} %", f"loss {scores['loss']:.3f}"),
        ("parameters", f"{fused.parameters / 1e6:.2f} M", f"{fused.flops / 1e6:.0f} M FLOPs"),
        ("one image", f"{1000 * fused.single:.1f} ms", f"{faster:.2f}x as fast as trained"),
        (
            "throughput",
            f"{deployment.batch / fused.batch:,.0f} / s",
            f"batch {deployment.batch}, threads: {deployment.threads}",
        ),
    ]


def images_by_source(data: ImageDataset, sources: Collection[str]) -> dict[str, Image]:
    """The images of these sources that the data set still has and that can be decoded."""
    images = {}
    for index in range(len(data)):
        if (source := data.source(index)) in sources:
            with contextlib.suppress(CorruptImageError):
                images[source] = data[index][0]
    return images


def gallery_entry(
    example: dict[str, Any], class_names: Sequence[str], images: dict[str, Image]
) -> dict[str, Any]:
    """One prediction with its image, where that is still there."""
    image = images.get(example["source"])
    return {
        "png": thumbnail(image) if image else None,
        "source": example["source"],
        "true": class_names[example["target"]],
        "predicted": class_names[example["prediction"]],
        "correct": example["target"] == example["prediction"],
        "probability": example["probability"],
        "true_probability": example["true_probability"],
    }


def thumbnail(image: Image) -> str:
    """A small copy of an image, as a PNG in base 64."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def percent(share: float | None) -> str:
    """A share of one as a percentage."""
    return "-" if share is None else f"{100 * share:.1f}\u00a0%"  # never a lone % on a line

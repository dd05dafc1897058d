"""``replknet eval``: measure a checkpoint on the validation images of a data set."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table
from rich.text import Text

from replknet.cli.typed import instantiate, json_text
from replknet.engine.classification import ClassificationEvalConfig, evaluate_classifier
from replknet.tasks.classification import DataConfig


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", help="published or own file, in any known format")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument(
        "--model", help="variant of a published file, such as replknet_31b.in1k_384"
    )
    parser.add_argument("--input-size", type=int, help="another size than the model's own")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a process at once")
    parser.add_argument("--workers", type=int, default=2, help="data-loading processes")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16", "float16"], default="float32"
    )


def run(arguments: Namespace) -> int:
    """Print the metrics."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    config = instantiate(ClassificationEvalConfig, arguments, checkpoint=Path(arguments.checkpoint))
    metrics = evaluate_classifier(config)
    if metrics is not None and arguments.json:
        print(json_text(metrics))
    elif metrics is not None:
        show(metrics)
    return 0


def show(metrics: dict[str, Any]) -> None:
    """Print the totals and a table per class."""
    console = Console()
    table = Table("class", "images", "recall", "precision", "F1")
    for row in metrics["per_class"]:
        figures = [row[key] for key in ("recall", "precision", "f1")]
        shares = ["-" if figure is None else f"{100 * figure:.1f} %" for figure in figures]
        table.add_row(Text(row["name"]), str(row["images"]), *shares)
    console.print(table)
    console.print(
        f"top-1 {metrics['top1']:.2f} %  top-5 {metrics['top5']:.2f} %  loss {metrics['loss']:.4f}"
        f"  over {metrics['images']} images, {metrics['skipped']} corrupt ones left out"
    )

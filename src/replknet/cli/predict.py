"""``replknet predict``: the classes of images, as lines, as JSON, or drawn under the images."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.text import Text

from replknet.cli.typed import json_text
from replknet.engine.distributed import choose_device
from replknet.export.classifier import ENGINES, load_exported
from replknet.models.writing import write_whole
from replknet.tasks.classification.classifier import Classifier, load_classifier
from replknet.tasks.classification.decoding import decode_image
from replknet.tasks.classification.overlay import draw_prediction
from replknet.tasks.classification.predict import Prediction, find_images, predict


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "checkpoint", help="our own file, or a published .pth; with --engine an exported file"
    )
    parser.add_argument(
        "sources", nargs="+", help="images, folders, glob patterns; - reads paths from stdin"
    )
    parser.add_argument(
        "--model", help="variant of a published file, such as replknet_31b.in1k_384"
    )
    parser.add_argument("--input-size", type=int, help="pixels; default: that of the checkpoint")
    parser.add_argument("--top-k", type=int, default=5, help="classes to show")
    parser.add_argument("--batch-size", type=int, default=8, help="images at once")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--engine",
        choices=list(ENGINES),
        help="run a file written by replknet export in this engine, on the CPU",
    )
    parser.add_argument("--overlays", metavar="DIR", help="write images with their classes here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--output", metavar="FILE", help="write JSON to a file")


def run(arguments: Namespace) -> int:
    """Predict and report; 1 if some image could not be read."""
    classifier = _load(arguments)
    sources = find_images(arguments.sources, sys.stdin)
    predictions = predict(
        classifier, sources, top_k=arguments.top_k, batch_size=arguments.batch_size
    )
    if arguments.overlays:
        predictions = _with_overlays(predictions, Path(arguments.overlays))
    if arguments.output:
        return _write_file(predictions, Path(arguments.output))
    return _write_json(predictions, sys.stdout) if arguments.json else _print_lines(predictions)


def _load(arguments: Namespace) -> Classifier:
    path, input_size = arguments.checkpoint, arguments.input_size
    if arguments.engine is None:
        device = choose_device(arguments.device, local_rank=0)
        return load_classifier(path, model=arguments.model, input_size=input_size, device=device)
    if arguments.model is not None or arguments.device not in ("auto", "cpu"):
        raise ValueError(
            "--model and --device are for checkpoints: a file for --engine says what it holds, "
            "and runs on the CPU"
        )
    return load_exported(path, arguments.engine, input_size=input_size)


def _with_overlays(predictions: Iterable[Prediction], folder: Path) -> Iterator[Prediction]:
    """Pass predictions on, drawing each; numbers keep files of one name apart."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, prediction in enumerate(predictions, start=1):
        if prediction.error is None:
            drawing = draw_prediction(decode_image(prediction.source), prediction)
            drawing.save(folder / f"{number:05d}_{Path(prediction.source).stem}.png")
        yield prediction


def _print_lines(predictions: Iterable[Prediction]) -> int:
    """One line an image, as soon as it is known."""
    failed = 0
    console = Console(soft_wrap=True, highlight=False)
    for prediction in predictions:
        if prediction.error is None:
            labels = ", ".join(f"{la.name} {la.probability:.1%}" for la in prediction.labels)
            console.print(Text(f"{prediction.source}: {labels}"))
        else:
            failed += 1
            reason = f"cannot be read: {prediction.error}"
            console.print(Text.assemble(f"{prediction.source}: ", (reason, "red")))
    return int(failed > 0)


def _write_file(predictions: Iterable[Prediction], path: Path) -> int:
    """The array of ``_write_json`` in a file that is complete, or as it was before."""
    if path.exists() and not path.is_file():  # a pipe or device is no file to replace
        with path.open("w", encoding="utf-8") as file:
            return _write_json(predictions, file)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(
            f"cannot write {path}: the folder {path.parent} is missing or read-only; make it, or "
            "choose another --output"
        )
    with TemporaryFile("w+", encoding="utf-8") as gathered:
        status = _write_json(predictions, gathered)
        gathered.seek(0)

        def write(partial: Path) -> None:
            with partial.open("w", encoding="utf-8") as file:
                shutil.copyfileobj(gathered, file)

        write_whole(path, write)
    return status


def _write_json(predictions: Iterable[Prediction], file: TextIO) -> int:
    """One array with an object for each image, written as soon as it is known."""
    failed = 0
    separator = "["
    for prediction in predictions:
        failed += prediction.error is not None
        print(separator, json_text(asdict(prediction)), sep="\n", end="", file=file, flush=True)
        separator = ","
    print("\n]" if separator == "," else "[]", file=file)
    return int(failed > 0)

"""``replknet export``: a checkpoint as a file for ONNX Runtime, OpenVINO or torch.export."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from replknet.export import (
    FORMATS,
    ExportConfig,
    VerificationError,
    export_checkpoint,
)
from replknet.export.pipeline import TOLERANCE
from replknet.export.sources import SOURCES
from replknet.tasks.classification.predict import find_images

MAX_IMAGES = 8  # they go through the networks as one batch


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("checkpoint", help="our own file, or a published .pth, in any form")
    parser.add_argument("--format", choices=list(FORMATS), required=True, help="kind of file")
    parser.add_argument("--output", metavar="FILE", required=True, help="file to write")
    parser.add_argument(
        "--task",
        choices=list(SOURCES),
        default="classification",
        help="with the classifier, or the backbone whose outputs are the features of each stage",
    )
    parser.add_argument(
        "--model", help="variant of a published file, such as replknet_31b.in1k_384"
    )
    parser.add_argument("--input-size", type=int, help="pixels; default: that of the checkpoint")
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help=f"images, folders, glob patterns, of which the first {MAX_IMAGES} verify the file "
        "(default: some that come with the package)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest difference of an output, in units of its spread",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(arguments: Namespace) -> int:
    """Export and report; 1 if the file's results are not the checkpoint's."""
    config = ExportConfig(
        checkpoint=Path(arguments.checkpoint),
        output=Path(arguments.output),
        format=arguments.format,
        task=arguments.task,
        model=arguments.model,
        input_size=arguments.input_size,
        images=tuple(islice(find_images(arguments.images, sys.stdin), MAX_IMAGES)),
        tolerance=arguments.tolerance,
        overwrite=arguments.overwrite,
    )
    try:
        report = export_checkpoint(config)
    except VerificationError as error:
        print(f"replknet export: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.to_dict()) if arguments.json else report)
    return 0

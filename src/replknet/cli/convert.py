"""``replknet convert``: a weights file in another format or form."""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from replknet.deploy.convert import FORMS, LAYOUTS, ConversionConfig, convert_checkpoint

_EMA = {"auto": None, "yes": True, "no": False}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("source", help="file of any known format")
    parser.add_argument("target", help="file to write")
    parser.add_argument(
        "--to",
        choices=["safetensors", *LAYOUTS],
        default="safetensors",
        help="format of the target",
    )
    parser.add_argument("--form", choices=FORMS, help="form of the network (default: as it is)")
    parser.add_argument(
        "--ema",
        choices=list(_EMA),
        default="auto",
        help="averaged weights of a trainer file: auto takes them if there are any",
    )
    parser.add_argument(
        "--model", help="variant of a published file, such as replknet_31b.in1k_384"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing target")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(arguments: Namespace) -> int:
    """Convert and report."""
    conversion = convert_checkpoint(
        ConversionConfig(
            source=Path(arguments.source),
            target=Path(arguments.target),
            layout=arguments.to,
            form=arguments.form,
            use_ema=_EMA[arguments.ema],
            model=arguments.model,
            overwrite=arguments.overwrite,
        )
    )
    print(json.dumps(conversion.to_dict()) if arguments.json else conversion)
    return 0

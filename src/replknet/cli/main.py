"""The ``replknet`` command: find the subcommand, parse its arguments, run it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

# Each module defines add_arguments(parser) and run(arguments) -> exit status, and is imported
# only when its command is asked for.
COMMANDS = {
    "demo": "train, evaluate, deploy and predict on images that come with the package",
    "train": "train or fine-tune a classifier, or continue a run",
    "eval": "measure a checkpoint on the validation images of a data set",
    "predict": "name the classes of images, with any checkpoint",
    "convert": "write a weights file in another format or form",
    "export": "write a checkpoint for ONNX Runtime, OpenVINO or torch.export, verified there",
    "report": "make an HTML page of a training run",
    "benchmark": "time the convolution, networks or training steps beside other engines",
    "models": "list the model variants with parameters, FLOPs, source and licence",
    "tables": "print a table of the paper beside what this project counts and measures",
    "doctor": "say what works on this machine, and what to do about the rest",
}


def build_parser(command: str) -> ArgumentParser:
    """Parser of one command, for ``replknet COMMAND ...`` and for the tests."""
    parser = ArgumentParser(prog=f"replknet {command}", description=COMMANDS[command])
    module(command).add_arguments(parser)
    return parser


def module(command: str):
    """Module that implements a command."""
    return importlib.import_module(f"replknet.cli.{command}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on a mistake of the caller."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, rest = words[0], words[1:]
    if command == "--version":
        from replknet import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f"replknet: there is no command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    arguments = build_parser(command).parse_args(rest)
    try:
        return module(command).run(arguments)
    except (ValueError, NotImplementedError, OSError) as error:
        if os.environ.get("REPLKNET_TRACEBACK"):
            raise
        print(f"replknet {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def usage() -> str:
    """Overview of the commands."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return (
        "usage: replknet COMMAND [options]\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`replknet COMMAND --help` shows the options of one."
    )


if __name__ == "__main__":
    sys.exit(main())

"""``replknet report``: a training run as one HTML page."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from replknet.analysis.report import write_report


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", help="directory of a classification run, such as runs/demo")


def run(arguments: Namespace) -> int:
    """Write the page into the run's directory."""
    print(write_report(arguments.run))
    return 0

"""``replknet benchmark model``: time the inference of whole networks in several engines."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from replknet.analysis.benchmark_model import ModelBenchmarkConfig
from replknet.cli import benchmark_networks

NOTES = (
    "memory: peak of the first two calls above the loaded model, in a process of its own",
    "difference: largest from PyTorch's outputs, in units of their spread",
)


def build_parser() -> ArgumentParser:
    """Options of the subcommand."""
    default = ModelBenchmarkConfig()
    parser = ArgumentParser(description="time the inference of whole networks in several engines")
    parser.add_argument(
        "--task",
        choices=["classifier", "backbone"],
        default=default.task,
        help="with the head, or as feature extractor for dense prediction",
    )
    benchmark_networks.add_options(parser, default)
    return parser


def run(arguments: Namespace, console: Console) -> int:
    """Measure and print; ``console`` shows the progress."""
    config = ModelBenchmarkConfig(task=arguments.task, **benchmark_networks.settings(arguments))
    return benchmark_networks.run(config, arguments, NOTES, console)

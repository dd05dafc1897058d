"""``replknet benchmark train``: time the training step of whole networks in several engines."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from replknet.analysis.benchmark_train import TrainBenchmarkConfig
from replknet.cli import benchmark_networks

NOTES = (
    "a step: forward, cross entropy, backward, AdamW",
    "memory: peak of the first two steps above the loaded model, so with the gradients and what",
    "the optimizer keeps, in a process of its own",
    "difference: of the gradient from PyTorch's, relative to its norm",
)


def build_parser() -> ArgumentParser:
    """Options of the subcommand."""
    parser = ArgumentParser(
        description="time the training step of whole networks in several engines"
    )
    benchmark_networks.add_options(parser, TrainBenchmarkConfig())
    return parser


def run(arguments: Namespace, console: Console) -> int:
    """Measure and print; ``console`` shows the progress."""
    config = TrainBenchmarkConfig(**benchmark_networks.settings(arguments))
    return benchmark_networks.run(config, arguments, NOTES, console)

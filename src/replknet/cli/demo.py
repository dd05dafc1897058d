"""``replknet demo``: train, evaluate, deploy and predict on images that come with the package."""

from __future__ import annotations

import shlex
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.markup import escape

from replknet.cli.main import main
from replknet.tasks.classification.arrays import shipped_fashion_mnist

SAMPLES = 8


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--directory", default="runs/demo", help="run directory")


def run(arguments: Namespace) -> int:
    """Run each command as a user would, printing it first; the first failure ends the demo."""
    directory = Path(arguments.directory)
    best = str(directory / "checkpoints" / "best.safetensors")
    return (
        show("train", "--config", "fashion_mnist_subset", "--run.directory", str(directory))
        or show("eval", best, "--data.format", "fashion-mnist")
        or show("predict", best, write_samples(directory / "samples"), "--top-k", "3")
        or show("report", str(directory))
    )


def show(*words: str) -> int:
    """Print a command, run it, and return its exit status."""
    console = Console(stderr=True, highlight=False)
    console.print(f"\n[bold]$ replknet {escape(shlex.join(words))}[/bold]")
    return main(words)


def write_samples(folder: Path) -> str:
    """Save a few validation images as files, named after what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    data = shipped_fashion_mnist("val", "L")
    for index in range(SAMPLES):
        image, target = data[index]
        name = data.class_names[target].replace("/", "-").replace(" ", "-").lower()
        image.save(folder / f"{index}-{name}.png")
    return str(folder)

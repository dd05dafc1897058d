"""What ``replknet benchmark model`` and ``train`` have in common: options, tables, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from replknet.analysis.benchmark_networks import (
    CaseTimings,
    NetworkBenchmarkConfig,
    NetworkTiming,
    run_benchmark,
)
from replknet.analysis.benchmark_networks_plot import plot
from replknet.analysis.machine import describe_machine, fma_peak_gflops
from replknet.analysis.memory import why_not_measurable
from replknet.cli.measuring import measure

_COMMON_NOTE = "random weights and pixels; medians of interleaved calls"


def add_options(parser: ArgumentParser, default: NetworkBenchmarkConfig) -> None:
    """Options that both subcommands have."""
    parser.add_argument(
        "--models", nargs="+", default=list(default.models), help="of this package or of timm"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(default.batch_sizes))
    parser.add_argument(
        "--image-sizes",
        nargs="+",
        default=["224"],
        help="pixels: one number for squares, or HEIGHTxWIDTH",
    )
    known, usual = list(default.known_engines()), list(default.default_engines())
    parser.add_argument(
        "--engines",
        nargs="+",
        default=[],
        help=f"of {', '.join(known)} (default: {'all' if usual == known else ', '.join(usual)})",
    )
    parser.add_argument("--threads", type=int, default=0, help="default: as PyTorch chooses")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="samples of each engine")
    parser.add_argument(
        "--max-seconds", type=float, default=default.max_seconds, help="for an engine and a case"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--plot", metavar="FILE", help="draw the times, as .svg or .png")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def settings(arguments: Namespace) -> dict[str, Any]:
    """Arguments of a ``NetworkBenchmarkConfig`` from the options."""
    return {
        "models": tuple(arguments.models),
        "batch_sizes": tuple(arguments.batch_sizes),
        "image_sizes": tuple(map(image_size, arguments.image_sizes)),
        "engines": tuple(arguments.engines),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "max_seconds": arguments.max_seconds,
        "memory": not arguments.no_memory,
    }


def run(
    config: NetworkBenchmarkConfig, arguments: Namespace, notes: Sequence[str], console: Console
) -> int:
    """Measure and print; ``notes`` explain the table, ``console`` shows the progress."""
    missing = config.missing_engines()
    for name, reason in missing.items():
        console.print(f"without {name}: {reason}", highlight=False)
    if config.memory and why_not_measurable():
        console.print(f"without peak memory: {why_not_measurable()}", highlight=False)
    threads = config.threads or torch.get_num_threads()
    peak = fma_peak_gflops(threads)
    show = None if arguments.json else _print_tables
    results = measure(lambda progress: run_benchmark(config, peak, progress), show, console)
    if arguments.plot:
        plot(results, Path(arguments.plot))
    if not arguments.json:
        _print_notes([f"{threads} threads; {_COMMON_NOTE}", *notes], peak)
        return 0
    content = {
        "machine": describe_machine() | {"threads": threads},
        "config": asdict(config),
        "fma_peak_gflops": peak,
        "missing": missing,
        "results": [asdict(result) for result in results],
    }
    json.dump(content, sys.stdout, indent=1)
    print()
    return 0


def image_size(text: str) -> tuple[int, int]:
    """Height and width from "224" or "512x2048"."""
    height, _, width = text.partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise ValueError(f"image size must look like 224 or 512x2048, got {text!r}") from None


def _print_tables(result: CaseTimings) -> None:
    console = Console()
    console.print(_table(result))
    console.print(_split_table(result))
    for line in comparisons(result):
        console.print(line, highlight=False)


def _print_notes(notes: Sequence[str], peak: float | None) -> None:
    console = Console()
    for note in notes:
        console.print(note, highlight=False)
    if peak is not None:
        console.print(f"peak: {peak:.0f} GFLOP/s of multiply-adds, measured", highlight=False)


def _table(result: CaseTimings) -> Table:
    table = Table(title=str(result.case))
    for heading in ("model", "engine"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "quartiles", "images/s", "of peak", "MiB", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for timing in result.timings:
        low, high = timing.quartiles_ms
        table.add_row(
            timing.model,
            timing.engine,
            f"{timing.median_ms:.1f}",
            f"{low:.1f}-{high:.1f}",
            f"{timing.images_per_second:.2f}",
            "" if timing.peak_fraction is None else f"{timing.peak_fraction:.0%}",
            "" if timing.peak_memory is None else f"{timing.peak_memory / 2**20:.0f}",
            f"{timing.difference:.0e}",
        )
    return table


def _split_table(result: CaseTimings) -> Table:
    """A row for each kind of layer, a column for each model and engine that was split."""
    split = [timing for timing in result.timings if timing.split]
    kinds = list(dict.fromkeys(kind for timing in split for kind in timing.split))
    table = Table("kind of layer", title="time by kind of layer, ms")
    for timing in split:
        table.add_column(f"{timing.model}\n{timing.engine}", justify="right")
    for kind in kinds:
        table.add_row(kind, *(_share(timing, kind) for timing in split))
    return table


def _share(timing: NetworkTiming, kind: str) -> str:
    if kind not in timing.split:
        return ""
    return f"{timing.split[kind]:.1f} ({timing.split[kind] / sum(timing.split.values()):.0%})"


def comparisons(result: CaseTimings) -> list[str]:
    """Ours against the best stock engine: of the same model, and of the last one named."""
    models = list(dict.fromkeys(timing.model for timing in result.timings))
    lines = []
    for model in models:
        ours = result.best(model, ours=True)
        for rival in dict.fromkeys((model, models[-1])):
            theirs = result.best(rival, ours=False)
            if ours is None or theirs is None:
                continue
            whose = "its" if rival == model else f"{rival} in its"
            line = f"{model}: {theirs.median_ms / ours.median_ms:.2f}x as fast as {whose} "
            line += f"best stock engine, {theirs.engine}"
            if ours.peak_memory and theirs.peak_memory:
                line += f"; {ours.peak_memory / theirs.peak_memory:.2f} of its peak memory"
            lines.append(line)
    return lines

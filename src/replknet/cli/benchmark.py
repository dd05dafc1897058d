"""``replknet benchmark``: time convolutions and networks against other engines; calibrate."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from replknet.analysis.benchmark_op import (
    SUITES,
    BenchmarkConfig,
    CaseTimings,
    missing_engines,
    run_benchmark,
)
from replknet.analysis.benchmark_op_plot import plot
from replknet.analysis.calibrate import calibrate
from replknet.analysis.machine import describe_machine, fma_peak_gflops
from replknet.cli import benchmark_model, benchmark_train
from replknet.cli.measuring import measure
from replknet.cli.typed import instantiate
from replknet.ops.cost import calibration_file

_NOTE = (
    "nominal and trimmed: GFLOP/s with and without the operations on padding\n"
    "speedup: over the faster of PyTorch's two memory formats"
)
_NETWORKS = {"model": benchmark_model, "train": benchmark_train}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommands and their options."""
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine, so that algorithm='auto' chooses by its own times",
    )
    subcommands = parser.add_subcommands(required=False, dest="what")
    op = ArgumentParser(description="time one depthwise convolution in several engines")
    op.add_argument(
        "--suite", choices=list(SUITES), default="replknet", help="convolutions to time"
    )
    op.add_argument("--batch-size", type=int, default=1, help="images")
    op.add_argument(
        "--passes",
        nargs="+",
        choices=["forward", "forward+backward"],
        default=["forward", "forward+backward"],
    )
    op.add_argument("--engines", nargs="+", default=[], help="names of engines (default: all)")
    op.add_argument("--threads", type=int, default=0, help="default: as PyTorch chooses")
    op.add_argument("--rounds", type=int, default=15, help="samples of each engine")
    op.add_argument("--max-seconds", type=float, default=5.0, help="for an engine and a case")
    op.add_argument("--plot", metavar="FILE", help="draw the times, as .svg or .png")
    op.add_argument("--json", action="store_true", help="print JSON instead of tables")
    subcommands.add_subcommand("op", op, help=op.description)
    for name, command in _NETWORKS.items():
        networks = command.build_parser()
        subcommands.add_subcommand(name, networks, help=networks.description)


def run(arguments: Namespace) -> int:
    """Calibrate or measure, and print."""
    console = Console(stderr=True)
    if arguments.calibrate:
        with console.status("calibrating") as status:
            table = calibrate(progress=lambda text: status.update(f"calibrating: {text}"))
        path = calibration_file(torch.get_num_threads())
        table.save(path)
        print(f"wrote {path}")
    if arguments.what == "op":
        return _run_op(arguments.op, console)
    if arguments.what in _NETWORKS:
        return _NETWORKS[arguments.what].run(arguments[arguments.what], console)
    if not arguments.calibrate:
        raise ValueError("nothing to do: give a subcommand (op, model, train) or --calibrate")
    return 0


def _run_op(arguments: Namespace, console: Console) -> int:
    config = instantiate(BenchmarkConfig, arguments)
    missing = missing_engines(config)
    for name, reason in missing.items():
        console.print(f"without {name}: {reason}", highlight=False)
    threads = config.threads or torch.get_num_threads()
    peak = fma_peak_gflops(threads)
    show = None if arguments.json else _print_table
    results = measure(lambda progress: run_benchmark(config, peak, progress), show, console)
    if arguments.plot:
        plot(results, Path(arguments.plot))
    if arguments.json:
        content = {
            "machine": describe_machine(),
            "threads": threads,
            "config": asdict(config),
            "fma_peak_gflops": peak,
            "missing": missing,
            "results": [asdict(result) for result in results],
        }
        json.dump(content, sys.stdout, indent=1)
        print()
    else:
        print(_NOTE)
        if peak is not None:
            print(f"peak: {peak:.0f} GFLOP/s of multiply-adds, measured")
    return 0


def _print_table(result: CaseTimings) -> None:
    table = Table(title=f"{result.case}, {result.passes} (auto: {result.auto})")
    table.add_column("engine", no_wrap=True)
    for heading in ("ms", "quartiles", "nominal", "trimmed", "of peak", "speedup"):
        table.add_column(heading, justify="right", no_wrap=True)
    for timing in result.timings:
        low, high = timing.quartiles_ms
        table.add_row(
            timing.engine,
            f"{timing.median_ms:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{timing.nominal_gflops:.0f}",
            f"{timing.trimmed_gflops:.0f}",
            "" if timing.peak_fraction is None else f"{timing.peak_fraction:.0%}",
            "" if timing.speedup is None else f"{timing.speedup:.2f}",
        )
    Console().print(table)

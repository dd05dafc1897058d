"""``replknet tables``: the paper's tables, beside what this project counts and measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console

from replknet.analysis.tables import ClassificationFigures, count_table_6, measure_table_6
from replknet.cli.output import compact_table, output_console


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("table", choices=["6"], help="number of the table in the paper")
    parser.add_argument(
        "--throughput", action="store_true", help="measure images per second on this machine too"
    )
    parser.add_argument("--batch", type=PositiveInt, default=1, help="images in a measured batch")
    parser.add_argument("--rounds", type=PositiveInt, default=5, help="measurements of each model")
    parser.add_argument("--json", action="store_true", help="print exact figures as JSON")


def run(arguments: Namespace) -> int:
    """Print the table."""
    figures = count_table_6()
    conditions = {}
    if arguments.throughput:
        with Console(stderr=True).status("measuring") as status:
            figures = measure_table_6(figures, arguments.batch, arguments.rounds, status.update)
        conditions = {
            "batch": arguments.batch,
            "rounds": arguments.rounds,
            "threads": torch.get_num_threads(),
        }
    if arguments.json:
        rows = [asdict(each) for each in figures]
        print(json.dumps({"table": 6, "rows": rows, "conditions": conditions}, indent=2))
    else:
        show(figures, conditions)
    return 0


def show(figures: Sequence[ClassificationFigures], conditions: dict[str, int]) -> None:
    """Print a table: the paper's figure first, ours after it."""
    columns = ["input", "top-1", "params (M)", "ours", "FLOPs (G)", "ours", "images/s", "to Swin"]
    if conditions:
        columns += ["here", "to Swin"]
    title = "Table 6: ImageNet-1K"
    table = compact_table("network", "pretraining", right=columns, title=title)
    for each in figures:
        row = each.paper
        cells = [
            str(row.size),
            number(row.top1, 1),
            number(row.parameters, 0),
            number(each.parameters / 1e6, 2),
            number(row.flops, 1),
            number(each.flops / 1e9, 3),
            number(row.throughput, 1),
            number(each.paper_ratio, 2),
        ]
        if conditions:
            cells += [number(each.throughput, 2), number(each.ratio, 2)]
        table.add_row(row.network, row.pretraining.removeprefix("ImageNet-"), *cells)
    console = output_console()
    console.print(table)
    console.print(
        "Unmarked columns are the paper's (images/s: batch 64, float32, RTX 2080 Ti); 'ours' is "
        "counted. RepLKNet is counted merged, with conv-BN fused; a FLOP is a multiply-add of a "
        "convolution, linear layer or matrix product. The paper quotes Swin's figures; ours count "
        "timm's Swin by the same rule."
    )
    if conditions:
        console.print(
            "'here': median of {rounds} rounds in turns, batch {batch}, float32, {threads} CPU "
            "threads; RepLKNet through replknet.optimize, Swin as in timm.".format(**conditions)
        )


def number(value: float | None, digits: int) -> str:
    """Rounded, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"

"""``replknet models``: the variants, and what each costs."""

from __future__ import annotations

import json
from dataclasses import asdict

from jsonargparse import ArgumentParser, Namespace

from replknet.analysis.catalog import Variant, list_variants
from replknet.cli.output import compact_table, output_console


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print exact figures as JSON")


def run(arguments: Namespace) -> int:
    """Print the variants."""
    variants = list_variants()
    if arguments.json:
        print(json.dumps([asdict(variant) for variant in variants], indent=2))
    else:
        show(variants)
    return 0


def show(variants: list[Variant]) -> None:
    """Print a table."""
    table = compact_table(
        "name", "source", "licence", right=("input", "classes", "params (M)", "FLOPs (G)")
    )
    for variant in variants:
        table.add_row(
            variant.name,
            variant.source,
            variant.license.upper(),
            str(variant.input_size[-1]),
            str(variant.classes),
            f"{variant.parameters / 1e6:.1f}",
            f"{variant.flops / 1e9:.2f}",
        )
    console = output_console()
    console.print(table)
    console.print(
        "Parameters as trained; FLOPs (multiply-adds) of the merged network. Published weights are "
        "not downloaded: --json names each file and the page of its authors."
    )

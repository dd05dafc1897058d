"""How commands print for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH_OF_A_FILE = 120


def output_console() -> Console:
    """Standard output; into a file or pipe, wide enough that tables are not folded."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE, highlight=False)


def compact_table(*left: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """Table with columns of text, then columns of numbers."""
    table = Table(*left, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in right:
        table.add_column(header, justify="right")
    return table

"""Run a benchmark with its progress on the terminal, and show each case when it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import Console

Result = TypeVar("Result")
Progress = Callable[[str], None]


def measure(
    run: Callable[[Progress], Iterator[Result]],
    show: Callable[[Result], None] | None,
    console: Console,
) -> list[Result]:
    """All that ``run`` yields, each given to ``show`` at once: who stops early has seen some.

    ``run`` is given a function that tells ``console`` what is being measured.
    """
    results = []
    with console.status("measuring") as status:
        for result in run(status.update):
            results.append(result)
            if show is not None:
                status.stop()
                show(result)
                status.start()
    return results

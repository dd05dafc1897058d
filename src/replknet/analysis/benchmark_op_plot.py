"""Draw the results of ``replknet benchmark op``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from replknet.analysis.benchmark_op import CaseTimings


def plot(results: Sequence[CaseTimings], path: Path) -> None:
    """Time against case, one line an engine, one panel for forward and one for training.

    Writes the format that the suffix of ``path`` names, such as .svg or .png.
    """
    passes = list(dict.fromkeys(result.passes for result in results))
    figure = Figure(figsize=(6 * len(passes), 4.5), layout="constrained")
    panels = figure.subplots(1, len(passes), squeeze=False)[0]
    for panel, name in zip(panels, passes, strict=True):
        rows = [result for result in results if result.passes == name]
        labels = [str(row.case) for row in rows]
        engines = dict.fromkeys(timing.engine for row in rows for timing in row.timings)
        for engine in engines:
            times = [
                next((t.median_ms for t in row.timings if t.engine == engine), float("nan"))
                for row in rows
            ]
            ours = engine.startswith("replknet")
            panel.plot(labels, times, "o-" if ours else "s--", markersize=4, label=engine)
        panel.set_yscale("log")
        panel.set_title(name)
        panel.set_ylabel("ms")
        panel.tick_params(axis="x", rotation=60, labelsize=7)
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.savefig(path)

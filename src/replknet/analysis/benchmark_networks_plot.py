"""Draw the results of ``replknet benchmark model`` and ``train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from replknet.analysis.benchmark_networks import CaseTimings
from replknet.analysis.plots import BLUE, GREY


def plot(results: Sequence[CaseTimings], path: Path) -> None:
    """One panel a case: milliseconds an image of every model in every engine.

    Writes the format that the suffix of ``path`` names, such as .svg or .png.
    """
    bars = max(len(result.timings) for result in results)
    figure = Figure(figsize=(8, len(results) * (1 + 0.3 * bars)), layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for panel, result in zip(panels, results, strict=True):
        labels = [f"{timing.model}, {timing.engine}" for timing in result.timings]
        times = [timing.median_ms / result.case.batch_size for timing in result.timings]
        colors = [BLUE if timing.ours else GREY for timing in result.timings]
        drawn = panel.barh(labels, times, color=colors)
        panel.bar_label(drawn, fmt="%.0f", fontsize=7, padding=2)
        panel.invert_yaxis()
        panel.set_title(str(result.case), fontsize=10)
        panel.set_xlabel("ms an image", fontsize=8)
        panel.tick_params(labelsize=7)
    figure.savefig(path)

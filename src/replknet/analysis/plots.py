"""Figures of a report, as SVG text that stands inside an HTML page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#94a3b8"
NUMBERED_CLASSES = 20  # above, the cells of a confusion matrix are too small for their counts


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def learning_curves(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    """Training and validation loss, validation accuracy, learning rate."""
    figure = Figure(figsize=(11, 3))
    loss, accuracy, rate = figure.subplots(1, 3)
    index = [record["step"] for record in steps]
    values = [record["loss"] for record in steps]
    loss.plot(index, values, color=GREY, linewidth=0.6, label="training, each step")
    loss.plot(index, running_mean(values), color=BLUE, label="training, mean")
    at = [record["step"] for record in evaluations]
    scores = [record["evaluation"] for record in evaluations]
    marker = "o" if len(at) < 30 else ""
    loss.plot(
        at, [s["loss"] for s in scores], color=ORANGE, marker=marker, ms=3, label="validation"
    )
    loss.legend(fontsize=7)
    epochs = [record["epoch"] for record in evaluations]
    accuracy.plot(epochs, [s["top1"] for s in scores], color=ORANGE, marker=marker, ms=3)
    accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate.plot(index, [record["lr"] for record in steps], color=BLUE)
    decorate(loss, "loss", "step")
    decorate(accuracy, "validation top-1, %", "epoch")
    decorate(rate, "learning rate", "step")
    figure.tight_layout()
    return svg(figure)


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Mean over the last twentieth of the run, so far as there is one."""
    width = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def confusion_matrix(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Share of each true class (rows) that was predicted as each class (columns)."""
    matrix = np.asarray(counts, dtype=float)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = min(12.0, 3 + 0.42 * len(class_names))
    figure = Figure(figsize=(size, size))
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(ticks, class_names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(class_names) <= NUMBERED_CLASSES:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(
                    column, row, f"{count:.0f}", ha="center", va="center", fontsize=7, color=color
                )
    return svg(figure)


def decorate(axes: Axes, title: str, xlabel: str) -> None:
    """Title, label and a light grid."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)

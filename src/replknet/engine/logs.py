"""What a run writes down as it goes: metrics.jsonl, TensorBoard events, a progress line."""

from __future__ import annotations

import json
import os
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from replknet.engine.config import flatten
from replknet.engine.run_directory import RunDirectory


class MetricLog:
    """Appends records to ``metrics.jsonl`` and their numbers to TensorBoard.

    Args:
        run: where to write.
        step: step that the run continues from.
        size: bytes of ``metrics.jsonl`` that belong to it; what a killed run wrote beyond is cut.
    """

    def __init__(self, run: RunDirectory, *, step: int, size: int) -> None:
        self._file = open(run.metrics, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._file.truncate(size)
        self._events = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; ``record["step"]`` is its place on the TensorBoard axis.

        Raises:
            OSError: the disk is full, for example.
        """
        line = json.dumps(record).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
            for name, value in flatten(record).items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    self._events.add_scalar(name.replace(".", "/"), value, record["step"])
        except OSError as error:
            raise OSError(
                f"cannot write {self._file.name} or its TensorBoard events: {error}"
            ) from error

    def sync(self) -> int:
        """Put all on disk; the size of ``metrics.jsonl`` in bytes."""
        self._events.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._events.close()


class ProgressLine:
    """One line on standard error that tells how the run stands; a context manager.

    Args:
        total: optimizer steps of the whole run.
        done: steps done before.
        visible: False prints nothing.
    """

    def __init__(self, total: int, *, done: int, visible: bool) -> None:
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True, quiet=not visible),
        )
        self._task = self._progress.add_task(
            "train", total=total, completed=done, epoch=1, figures=""
        )

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Show the figures of a training step."""
        figures = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['samples_per_second']:.0f} samples/s"
        )
        self._progress.update(
            self._task, completed=record["step"], epoch=record["epoch"], figures=figures
        )

    def print(self, message: str) -> None:
        """Print a line above the progress."""
        self._progress.console.print(message, markup=False, highlight=False)

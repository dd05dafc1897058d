"""A run directory: whose it is, and where its files are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from replknet.engine.config import TrainConfig, differences, identity, plain
from replknet.models.writing import write_whole

OWN_FILES = ("config.yaml", "environment.json", "metrics.jsonl")
OWN_DIRECTORIES = ("checkpoints", "tensorboard", "nonfinite")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        """Resolved configuration; its presence makes the directory a run's."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions and hardware of the last launch."""
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line: training steps and evaluations."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Trainer state, and the last and best models."""
        return self.root / "checkpoints"

    @property
    def nonfinite(self) -> Path:
        """Batches whose loss or gradient was NaN or infinite."""
        return self.root / "nonfinite"

    def holds_results(self) -> bool:
        """Whether the run has come to a checkpoint, or to batches that are not finite."""
        return any(
            not path.name.startswith(".")
            for folder in (self.checkpoints, self.nonfinite)
            if folder.exists()
            for path in folder.iterdir()
        )


@contextmanager
def claim(config: TrainConfig) -> Iterator[RunDirectory]:
    """The directory of ``config.run``, made this run's: a new one, or the same run continued.

    Another run without results, such as one whose data were not found, gives way. No other
    process can claim the directory in the meantime; a killed one gives it back.

    Raises:
        ValueError: it holds another run or files that no run wrote, or another process trains in
            it; nothing has been changed.
    """
    run = RunDirectory(Path(config.run.directory))
    refuse_other_files(run)
    run.root.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run.root / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another process trains in {run.root}; wait for it to end, or choose another "
            "--run.directory"
        ) from error
    with lock:
        take_over(run, config)
        yield run


def refuse_other_files(run: RunDirectory) -> None:
    """Raise ValueError if the directory holds what no run wrote."""
    if run.root.exists() and not run.root.is_dir():
        raise ValueError(f"run.directory {run.root} is a file; choose another")
    if run.config.exists() or not run.root.exists():
        return
    if any(not path.name.startswith(".") for path in run.root.iterdir()):
        raise ValueError(
            f"run.directory {run.root} holds files but no run (no config.yaml); choose an empty "
            "or new directory"
        )


def take_over(run: RunDirectory, config: TrainConfig) -> None:
    """Write the configuration of this launch, unless the directory holds another run's results."""
    values = plain(config)
    if run.config.exists() and (config.run.overwrite or gives_way(run, values)):
        delete(run)
    for partial in (*run.root.glob(".*.partial"), *run.checkpoints.glob(".*.partial")):
        partial.unlink()  # of a write that was killed
    text = yaml.safe_dump(values, sort_keys=False)
    write_whole(run.config, lambda partial: partial.write_text(text, encoding="utf-8"))
    run.checkpoints.mkdir(exist_ok=True)


def gives_way(run: RunDirectory, values: dict[str, Any]) -> bool:
    """Whether the directory's run is another one than that of ``values``, without results.

    Raises:
        ValueError: it is another one that has results, with the differences.
    """
    stored = identity(yaml.safe_load(run.config.read_text(encoding="utf-8")))
    different = differences(stored, identity(values), words="{} there, {} asked")
    if different and run.holds_results():
        raise ValueError(
            f"{run.root} already holds another run, which differs in {', '.join(different)}; "
            "choose another --run.directory, or delete that run with --run.overwrite true"
        )
    return bool(different)


def delete(run: RunDirectory) -> None:
    """Delete what a run wrote, and nothing else; ``config.yaml`` goes last."""
    for name in OWN_DIRECTORIES:
        shutil.rmtree(run.root / name, ignore_errors=True)
    for name in reversed(OWN_FILES):
        (run.root / name).unlink(missing_ok=True)

"""Files that are either whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

# a full disk: from Python, from torch's writer, from safetensors' writer
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def write_atomically(
    path: Path, write: Callable[[Path], object], *, previous: Path | None = None
) -> None:
    """Let ``write`` make a file beside ``path``, and put it in the place of ``path`` once on disk.

    A kill at any moment leaves the old file or the new one; a failure leaves the old one. With
    ``previous``, the old file is kept under that name (for an instant it is the only one).

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
        sync_directory(path.parent)
    except WRITE_ERRORS as error:
        raise OSError(
            f"cannot write {path} ({error}); the file it was to replace is intact"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

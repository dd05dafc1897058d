"""What differs between the tensors of a file and those of a model, in words."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

LISTED = 6


@dataclass(frozen=True)
class Mismatch:
    """Names that only one side has, and names whose shapes differ."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)


def compare(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Mismatch:
    """Differences between the tensors ``found`` in a file and those a model ``wanted``."""
    return Mismatch(
        missing=tuple(name for name in wanted if name not in found),
        unexpected=tuple(name for name in found if name not in wanted),
        reshaped=tuple(
            name for name in wanted if name in found and found[name].shape != wanted[name].shape
        ),
    )


def describe(
    mismatch: Mismatch, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> list[str]:
    """One line for each difference, a few of each kind, with the nearest name or both shapes."""
    counts = f"{len(mismatch.missing)} missing, {len(mismatch.unexpected)} unexpected, "
    counts += f"{len(mismatch.reshaped)} of another shape"
    lines = [counts]
    lines += _listed("missing", mismatch.missing, mismatch.unexpected)
    lines += _listed("unexpected", mismatch.unexpected, mismatch.missing)
    lines += _cut(
        [
            f"  shape of {name}: {tuple(found[name].shape)} in the file, "
            f"{tuple(wanted[name].shape)} in the model"
            for name in mismatch.reshaped[: LISTED + 1]
        ],
        len(mismatch.reshaped),
    )
    return lines


def _listed(kind: str, names: Sequence[str], others: Collection[str]) -> list[str]:
    lines = []
    for name in names[: LISTED + 1]:
        nearest = difflib.get_close_matches(name, others, n=1, cutoff=0.7)
        lines.append(f"  {kind}: {name}" + (f" (nearest: {nearest[0]})" if nearest else ""))
    return _cut(lines, len(names))


def _cut(lines: list[str], count: int) -> list[str]:
    if count <= LISTED:
        return lines
    return [*lines[:LISTED], f"  ... and {count - LISTED} more"]

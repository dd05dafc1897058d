"""Configurations of toy runs, and what is compared between two of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from toy import ToyConfig, ToyTrainConfig

from replknet.engine.config import (
    BatchConfig,
    EmaConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)


def toy_config(directory: Path, *, run: dict[str, Any] | None = None, **sections: Any):
    """Three epochs of six steps with everything on that has state or draws random numbers."""
    config = ToyTrainConfig(
        data=ToyConfig(dropout=0.2, batch_norm=True),
        batch=BatchConfig(total=8),
        optimizer=OptimizerConfig(lr=1e-2, layer_decay=0.5, clip_grad=1.0),
        schedule=ScheduleConfig(epochs=3, warmup_epochs=1),
        ema=EmaConfig(decay=0.8),
        run=RunConfig(directory=str(directory), workers=0, progress=False, checkpoint_steps=4),
    )
    return replace(config, run=replace(config.run, **(run or {})), **sections)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Records of ``metrics.jsonl`` without what depends on the clock."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("samples_per_second", None)
    return records


def differences(left: Path, right: Path) -> list[str]:
    """Where two finished runs are not the same, bit for bit; empty if they are."""
    found = []
    for name in ("last.safetensors", "best.safetensors"):
        a, b = (load_file(run / "checkpoints" / name) for run in (left, right))
        found += [f"{name} {key}" for key in a.keys() ^ b.keys()]
        found += [f"{name} {key}" for key in a.keys() & b.keys() if not torch.equal(a[key], b[key])]
    a, b = (
        torch.load(run / "checkpoints" / "state.pt", weights_only=True) for run in (left, right)
    )
    a.pop("metrics_size")
    b.pop("metrics_size")
    found += compare(a, b, "state")
    if read_metrics(left) != read_metrics(right):
        found.append("metrics.jsonl")
    return found


def compare(a: Any, b: Any, name: str) -> list[str]:
    """Dotted names of the leaves in which two nested states differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{name}: {a.keys()} and {b.keys()}"]
        return [line for key in a for line in compare(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [
            line
            for index, (x, y) in enumerate(zip(a, b, strict=True))
            for line in compare(x, y, f"{name}.{index}")
        ]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]

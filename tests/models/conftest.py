"""Weight files for the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from replknet.models import save_checkpoint


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write an object with torch.save, or a state dict as our own file."""

    def write(content: object, name: str = "file.pth", metadata: dict | None = None) -> Path:
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_checkpoint(path, content, metadata or {})
        else:
            torch.save(content, path)
        return path

    return write

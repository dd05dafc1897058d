from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_images():
    """Function that fills a folder with images of its own random pixels: {relative path}."""

    def write(root: Path, *names: str, size=(24, 20)) -> None:
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            seed = int.from_bytes(name.encode(), "big") % 2**32
            pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)

    return write


@pytest.fixture
def cats_and_dogs(tmp_path, write_images):
    """A folder of two classes with ten images each."""
    root = tmp_path / "pets"
    write_images(root, *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(10)))
    return root

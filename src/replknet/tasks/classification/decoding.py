"""Image files to pixels: the one place where a broken file can raise."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

ImageMode = Literal["RGB", "L"]


class CorruptImageError(ValueError):
    """An image that cannot be decoded; ``source`` is its name, ``reason`` says why."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason


def decode_image(
    file: str | Path | bytes, mode: ImageMode = "RGB", *, source: str = ""
) -> Image.Image:
    """Decode the first frame of an image file (a path, or the file's bytes) as RGB or greyscale.

    Upright by its EXIF orientation; transparency is shown on white; 16-bit images keep their upper
    8 bits. Raises ``CorruptImageError``, naming ``source`` (by default the path), whatever the
    decoder raised.
    """
    source = source or (str(file) if isinstance(file, (str, Path)) else "image")
    # Pillow raises OSError, ValueError, SyntaxError, NotImplementedError, DecompressionBombError,
    # struct.error and more, depending on the format and on where the file is broken.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata in a file that decodes
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                return to_mode(ImageOps.exif_transpose(image), mode)
    except Exception as error:
        raise CorruptImageError(source, f"{type(error).__name__}: {error}") from error


def to_mode(image: Image.Image, mode: ImageMode) -> Image.Image:
    """Convert an image of any Pillow mode to RGB or greyscale as a viewer would show it."""
    if min(image.size) < 1:
        raise ValueError(f"the image has no pixels: {image.width} x {image.height}")
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode == "LAB":
        image = image.convert("RGB")  # the only mode that Pillow converts it to
    return image.convert(mode)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale a one-channel image of 16 or 32 bits, which ``convert`` would clip at 255."""
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F":
        scale = 255.0 if pixels.max() <= 1 else 1.0
    else:
        wide = image.mode.startswith("I;16") or pixels.max() > 255
        scale = 1 / 256 if wide else 1.0
    return Image.fromarray((pixels * scale).clip(0, 255).astype(np.uint8))

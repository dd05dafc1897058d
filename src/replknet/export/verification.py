"""Does an exported file compute what the network computes?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replknet.deploy import compare
from replknet.tasks.classification import Preprocessing
from replknet.tasks.classification.arrays import shipped_fashion_mnist


class VerificationError(RuntimeError):
    """The file does not give the network's results in the engine it is meant for."""


@dataclass(frozen=True)
class Check:
    """One batch in the engine and in the network.

    Attributes:
        shape: Of the batch, (N, C, H, W).
        difference: Largest absolute difference of an output.
        relative: The same, in units of the outputs' spread (standard deviation).
        agreement: Share of images whose most probable class is the same.
    """

    shape: tuple[int, ...]
    difference: float
    relative: float
    agreement: float


def verify(
    model: nn.Module, exported: nn.Module, images: Tensor, tolerance: float
) -> tuple[Check, ...]:
    """Compare on ``images`` as one batch, and on one and two of them in other sizes.

    Raises:
        VerificationError: A difference is above ``tolerance`` times the outputs' spread, or an
            output is not finite.
    """
    height, width = images.shape[2:]
    batches = [
        images,
        _resized(images[:1], height + height // 4 + 1, width),
        _resized(images[:2], height, width - width // 4),
    ]
    results = [compare(model, exported, batch) for batch in batches]
    # Of all batches: the outputs for a single image may happen to lie close together.
    spread = max(result.spread for result in results)
    for batch, result in zip(batches, results, strict=True):
        if not result.difference <= tolerance * spread:
            raise VerificationError(
                f"the results on a batch of {tuple(batch.shape)} differ by "
                f"{result.difference:.1e}; their spread is {spread:.1e}, of which "
                f"{tolerance:.0e} is allowed"
            )
    return tuple(
        Check(
            shape=tuple(batch.shape),
            difference=result.difference,
            relative=result.difference / spread if spread else 0.0,
            agreement=result.agreement,
        )
        for batch, result in zip(batches, results, strict=True)
    )


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def sample_images(preprocessing: Preprocessing, count: int = 4) -> Tensor:
    """Mosaics of the Fashion-MNIST images that come with the package, normalised.

    (count, channels, input_size, input_size); every tile of every channel is another image, as
    far as there are enough of them.
    """
    pixels = shipped_fashion_mnist("val").images
    tile, size, channels = pixels.shape[1], preprocessing.input_size, preprocessing.channels
    across = math.ceil(size / tile)
    tiles = np.resize(pixels, (count, channels, across, across, tile, tile))
    mosaics = tiles.swapaxes(3, 4).reshape(count, channels, across * tile, across * tile)
    images = torch.from_numpy(mosaics[..., :size, :size].astype(np.float32) / 255)
    mean, std = torch.tensor([preprocessing.mean, preprocessing.std])[:, :, None, None]
    return (images - mean) / std

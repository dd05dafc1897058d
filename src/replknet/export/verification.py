"""Does an exported file compute what the network computes?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from replknet.deploy.equivalence import compare_outputs, evaluate
from replknet.tasks.classification import Preprocessing
from replknet.tasks.classification.arrays import shipped_fashion_mnist

LOGITS = "logits"
"""Name of the output of a classifier."""


class VerificationError(RuntimeError):
    """The file does not give the network's results in the engine it is meant for."""


@dataclass(frozen=True)
class Check:
    """One output for one batch, in the engine and in the network.

    Attributes:
        output: Name of the output.
        shape: Of the batch, (N, C, H, W).
        difference: Largest absolute difference.
        relative: The same, in units of the output's spread (standard deviation).
        agreement: Share of images, or of positions in a map, with the largest channel the same:
            the most probable class, of a classifier.
    """

    output: str
    shape: tuple[int, ...]
    difference: float
    relative: float
    agreement: float


def verify(
    model: nn.Module,
    exported: nn.Module,
    images: Tensor,
    tolerance: float,
    names: Sequence[str] = (LOGITS,),
) -> tuple[Check, ...]:
    """Compare on ``images`` as one batch, and on one and two of them in other sizes.

    Every output, of which ``names`` are the names, is compared by itself.

    Raises:
        VerificationError: A difference is above ``tolerance`` times the output's spread, or an
            output is not finite.
    """
    height, width = images.shape[2:]
    batches = [
        images,
        _resized(images[:1], height + height // 4 + 1, width),
        _resized(images[:2], height, width - width // 4),
    ]
    expected = [pytree.tree_leaves(evaluate(model, batch)) for batch in batches]
    actual = [pytree.tree_leaves(evaluate(exported, batch)) for batch in batches]
    checks: list[Check] = []
    for i, name in enumerate(names):
        results = [compare_outputs(e[i], a[i]) for e, a in zip(expected, actual, strict=True)]
        # Of all batches: the outputs for a single image may happen to lie close together.
        spread = max(spread for _, spread, _ in results)
        for batch, (difference, _, agreement) in zip(batches, results, strict=True):
            shape = tuple(batch.shape)
            if not difference <= tolerance * spread:
                raise VerificationError(
                    f"{name} for a batch of {shape} differs by {difference:.1e}; its spread is "
                    f"{spread:.1e}, of which {tolerance:.0e} is allowed"
                )
            relative = difference / spread if spread else 0.0
            checks.append(Check(name, shape, difference, relative, agreement))
    return tuple(checks)


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

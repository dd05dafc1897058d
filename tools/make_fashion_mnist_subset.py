"""Make src/replknet/data/fashion_mnist_subset.npz from the full Fashion-MNIST.

    python tools/make_fashion_mnist_subset.py FOLDER

FOLDER holds the four published IDX files, as Debian's package dataset-fashion-mnist installs them
in /usr/share/datasets/fashion-mnist. The subset is the first 5,000 training and the first 1,000
test images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from replknet.tasks.classification.arrays import read_idx

SIZES = {"train": 5000, "val": 1000}
DESTINATION = Path(__file__).parents[1] / "src/replknet/data/fashion_mnist_subset.npz"


def main(folder: str) -> None:
    arrays = {}
    for split, size in SIZES.items():
        full = read_idx(Path(folder), split)
        arrays[f"{split}_images"] = full.images[:size]
        arrays[f"{split}_targets"] = full.targets[:size]
    np.savez_compressed(DESTINATION, **arrays)
    print(f"{DESTINATION}: {DESTINATION.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

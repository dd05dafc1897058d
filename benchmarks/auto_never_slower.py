"""Compare algorithm="auto" with PyTorch's faster memory format over a grid of sizes.

    python benchmarks/auto_never_slower.py [--every N] [--slower-than 0.95]

Prints the cases where "auto" is slower than asked for, the worst first, and the quantiles of all.
"""

from __future__ import annotations

import argparse
import itertools
from statistics import median

import torch

from replknet.analysis.benchmark_op import interleave
from replknet.analysis.op_engines import Case, chosen_algorithms, engines

KERNEL_SIZES = (3, 5, 7, 9, 11, 13, 17, 21, 25, 31, 51)
MAPS = ((7, 7), (14, 14), (28, 28), (56, 56), (64, 48), (112, 112))
CHANNELS = (32, 96, 130, 512)
BATCHES = (1, 8)
LAYOUTS = ("nchw", "channels_last")
ROUNDS, MAX_SECONDS = 7, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="measure every N-th case of the grid")
    parser.add_argument("--slower-than", type=float, default=0.95)
    arguments = parser.parse_args()
    grid = list(itertools.product(MAPS, BATCHES, CHANNELS, KERNEL_SIZES))[:: arguments.every]
    ratios = []
    for size, batch, channels, kernel_size in grid:
        case = Case(batch, channels, size, (kernel_size, kernel_size))
        for train in (False, True):
            for layout, ratio in compare(case, train).items():
                ratios.append((ratio, case, "train" if train else "forward", layout))
    ratios.sort(key=lambda row: row[0])
    slow = [row for row in ratios if row[0] < arguments.slower_than]
    for ratio, case, passes, layout in slow:
        print(f"{ratio:.2f}x  {case}  {passes}  {layout}  ({chosen_algorithms(case)})")
    print(f"{len(slow)} of {len(ratios)} slower than {arguments.slower_than} of PyTorch's best, ")
    print(f"with {torch.get_num_threads()} threads; speedups at 0, 1, 5, 25, 50, 75, 100 %:")
    values = [row[0] for row in ratios]
    at = [values[int(p * (len(values) - 1))] for p in (0, 0.01, 0.05, 0.25, 0.5, 0.75, 1)]
    print("  ".join(f"{value:.2f}x" for value in at))


def compare(case: Case, train: bool) -> dict[str, float]:
    """Speedup of "auto" over PyTorch's best, by memory format."""
    known = engines()
    calls = {}
    for library in ("pytorch", "replknet"):
        for layout in LAYOUTS:
            engine = known[f"{library} {layout}"]
            prepare = engine.train if train else engine.forward
            assert prepare is not None
            calls[engine.name] = prepare(case)
    times = {name: median(s) for name, s in interleave(calls, ROUNDS, MAX_SECONDS).items()}
    best = min(times[f"pytorch {layout}"] for layout in LAYOUTS)
    return {layout: best / times[f"replknet {layout}"] for layout in LAYOUTS}


if __name__ == "__main__":
    main()

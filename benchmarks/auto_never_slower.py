"""Compare algorithm="auto" with PyTorch's faster memory format over a grid of sizes.

    python benchmarks/auto_never_slower.py [--kernel-sizes 3 5 7] [--every N] [--slower-than 0.95]
    python benchmarks/auto_never_slower.py --rows rows.jsonl --seconds 80  # again until all is done

Prints the cases where "auto" is slower than asked for, the worst first, and the quantiles of all.
With --rows, cases are kept in a file and not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from replknet.analysis.op_engines import Call, Case, engines
from replknet.analysis.timing import interleave
from replknet.engine.allocator import keep_freed_memory

KERNEL_SIZES = (3, 5, 7, 9, 11, 13, 17, 21, 25, 31, 51)
MAPS = ((7, 7), (14, 14), (28, 28), (56, 56), (64, 48), (112, 112))
CHANNELS = (32, 96, 130, 512)
BATCHES = (1, 8)
LAYOUTS = ("nchw", "channels_last")
ROUNDS, MAX_SECONDS = 7, 0.2
PART_CHANNELS = 16


def main() -> None:
    keep_freed_memory()  # lest new pages count for some engines only
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel-sizes", type=int, nargs="+", default=KERNEL_SIZES)
    parser.add_argument("--every", type=int, default=1, help="measure every N-th case of the grid")
    parser.add_argument("--slower-than", type=float, default=0.95)
    parser.add_argument("--rows", type=Path, help="keep what is measured in this file")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    arguments = parser.parse_args()
    grid = list(itertools.product(MAPS, BATCHES, CHANNELS, arguments.kernel_sizes))
    grid = grid[:: arguments.every]
    cases = [Case(batch, channels, size, (k, k)) for size, batch, channels, k in grid]
    path = arguments.rows
    kept = path.read_text().splitlines() if path and path.exists() else []
    rows = {row["case"]: row for row in map(json.loads, kept)}
    end = time.monotonic() + arguments.seconds
    for case in cases:
        if str(case) in rows or time.monotonic() > end:
            continue
        rows[str(case)] = measure(case)
        if path:
            with path.open("a") as file:
                file.write(json.dumps(rows[str(case)]) + "\n")
    report([rows[str(case)] for case in cases if str(case) in rows], arguments.slower_than)


def measure(case: Case) -> dict[str, Any]:
    """Seconds of both passes in both memory formats, ours and PyTorch's."""
    return {
        "case": str(case),
        "forward": compare(case, train=False),
        "forward+backward": compare(case, train=True),
    }


def compare(case: Case, train: bool) -> dict[str, float]:
    """Seconds by engine; of a part, if that takes PyTorch much longer than us the whole."""
    ours = {name: prepare(name, case, train) for name in names("replknet")}
    enough = 2 * sum(second_time(call) for call in ours.values())
    bounds = {name: part_time(name, case, train, enough) for name in names("pytorch")}
    rivals = {n: prepare(n, case, train) for n, bound in bounds.items() if bound < enough}
    samples = interleave({**ours, **rivals}, ROUNDS, MAX_SECONDS)
    return bounds | {name: median(seconds) for name, seconds in samples.items()}


def part_time(name: str, case: Case, train: bool, enough: float) -> float:
    """Seconds of one image, or of some of its channels if that takes `enough` already."""
    for part in (replace(case, batch=1, channels=PART_CHANNELS), replace(case, batch=1)):
        seconds = second_time(prepare(name, part, train))
        if seconds > enough:
            break
    return seconds


def second_time(call: Call) -> float:
    """Seconds of a call after a first one, which prepares."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def names(library: str) -> list[str]:
    return [f"{library} {layout}" for layout in LAYOUTS]


def prepare(name: str, case: Case, train: bool) -> Call:
    engine = engines()[name]
    prepare = engine.train if train else engine.forward
    assert prepare is not None
    return prepare(case)


def report(rows: list[dict[str, Any]], limit: float) -> None:
    """Print what is slower than `limit` of PyTorch's best, and quantiles of the speedups.

    Speedups beyond 1 may be lower bounds: see ``compare``.
    """
    ratios = []
    for row in rows:
        for passes in ("forward", "forward+backward"):
            times = row[passes]
            best = min(times[name] for name in names("pytorch"))
            ratios += [
                (best / times[name], row["case"], passes, name) for name in names("replknet")
            ]
    ratios.sort()
    slow = [row for row in ratios if row[0] < limit]
    for ratio, case, passes, name in slow:
        print(f"{ratio:.2f}x  {case}  {passes}  {name.removeprefix('replknet ')}")
    print(f"{len(slow)} of {len(ratios)} slower than {limit} of PyTorch's best, ")
    print(f"with {torch.get_num_threads()} threads; speedups at 0, 1, 5, 25, 50, 75, 100 %:")
    values = [row[0] for row in ratios]
    at = [values[int(p * (len(values) - 1))] for p in (0, 0.01, 0.05, 0.25, 0.5, 0.75, 1)]
    print("  ".join(f"{value:.2f}x" for value in at))


if __name__ == "__main__":
    main()

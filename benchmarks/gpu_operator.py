"""The depthwise convolution on a CUDA GPU: the tables of docs/gpu.md.

    python benchmarks/gpu_operator.py operator   # each pass by each algorithm, milliseconds
    python benchmarks/gpu_operator.py paper      # the paper's stacks of 24 convolutions
    python benchmarks/gpu_operator.py rule       # how far "auto" is from the fastest algorithm
    python benchmarks/gpu_operator.py rule --layout channels_last --json rows.jsonl

Calls come from Python, one after the other; with --graph they are replayed from a CUDA graph, which
leaves the GPU's own time. A time is the median of rounds over all contenders.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Any

import torch
import torch.nn.functional as F

from replknet.ops import depthwise_conv2d, explain, problem_of
from replknet.ops.passes import forward, grad_input, grad_weight

PASSES = ("forward", "grad_input", "grad_weight")
CONTENDERS = ("torch", "torch_fft", "triton")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# batch, channels, side of the map, side of the kernel
OPERATOR_SIZES = [
    (32, 128, 56, 31),
    (32, 256, 28, 29),
    (32, 512, 14, 27),
    (32, 1024, 7, 13),
    (64, 384, 64, 31),
    (64, 384, 32, 31),
    (64, 384, 16, 31),
    (64, 384, 64, 13),
    (64, 384, 64, 7),
    (8, 64, 200, 31),
    (1, 128, 56, 31),
    (1, 256, 28, 29),
]
PAPER_BATCH, PAPER_CHANNELS, PAPER_DEPTH = 64, 384, 24
PAPER_MAPS = (16, 32, 64)
PAPER_KERNELS = (3, 5, 7, 9, 13, 17, 21, 27, 29, 31)
RULE_SIZES = [
    (batch, channels, size, kernel_size)
    for size, channels in ((7, 1024), (14, 512), (28, 256), (56, 128), (112, 64))
    for batch in (1, 8, 32)
    for kernel_size in (3, 5, 7, 9, 13, 21, 31)
    if kernel_size < 2 * size
]
ROUNDS, SECONDS_PER_ROUND = 3, 0.004
Call = Callable[..., Any]
Prepare = Callable[[Call], Call]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("operator", "paper", "rule"))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16"])
    parser.add_argument("--layout", choices=FORMATS, default="nchw")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {arguments.layout}")
    tables = {"operator": operator_table, "paper": paper_table, "rule": rule_table}
    prepare = captured if arguments.graph else warm
    for row in tables[arguments.table](arguments.dtypes, FORMATS[arguments.layout], prepare):
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps([arguments.table, arguments.layout, row]) + "\n")


def operator_table(
    dtypes: list[str], format: torch.memory_format, prepare: Prepare
) -> Iterator[dict]:
    """Milliseconds of every pass by every algorithm."""
    print("| map / kernel, batch x channels | dtype | pass | torch | torch_fft | triton | auto |")
    print("|---|---|---|---|---|---|---|")
    for size in OPERATOR_SIZES:
        for dtype in dtypes:
            for row in passes(size, dtype, format, CONTENDERS, prepare):
                batch, channels, side, kernel_size = size
                times = " | ".join(f"{row[name]:.3f}" for name in CONTENDERS)
                print(
                    f"| {side} / {kernel_size}, {batch} x {channels} | {dtype} | {row['pass']} "
                    f"| {times} | {row['auto']} |",
                    flush=True,
                )
                yield row


def paper_table(dtypes: list[str], format: torch.memory_format, prepare: Prepare) -> Iterator[dict]:
    """Milliseconds of 24 convolutions in a row, forward, on (64, 384, R, R)."""
    print(f"| R | dtype | K | PyTorch | ours |\n|{'---|' * 5}")
    for side in PAPER_MAPS:
        for dtype in dtypes:
            for kernel_size in PAPER_KERNELS:
                size = PAPER_BATCH, PAPER_CHANNELS, side, kernel_size
                arguments = tensors(size, dtype, format)
                with torch.no_grad():
                    times = measure(
                        {
                            "PyTorch": partial(stack, pytorch, *arguments),
                            "ours": partial(stack, depthwise_conv2d, *arguments),
                        },
                        prepare,
                    )
                row = {"size": size, "dtype": dtype} | times
                print(
                    f"| {side} | {dtype} | {kernel_size} | {row['PyTorch']:.2f} "
                    f"| {row['ours']:.2f} |",
                    flush=True,
                )
                yield row


def rule_table(dtypes: list[str], format: torch.memory_format, prepare: Prepare) -> Iterator[dict]:
    """The cases where "auto" is much slower than the fastest, and the quantiles of all."""
    ratios = []
    for size in RULE_SIZES:
        for dtype in dtypes:
            contenders = CONTENDERS if size[3] > 5 else ("torch", "triton")
            for row in passes(size, dtype, format, contenders, prepare):
                fastest = min(contenders, key=lambda name: row[name])
                ratios.append(row[row["auto"]] / row[fastest])
                if ratios[-1] > 1.2:
                    print(f"{ratios[-1]:.2f}x  {row}", flush=True)
                yield row
    parts = quantiles(ratios, n=20)
    print(
        f"{len(ratios)} cases: auto takes {geometric_mean(ratios):.3f}x of the fastest, "
        f"19 of 20 at most {parts[-1]:.2f}x, the worst {max(ratios):.2f}x"
    )


def passes(
    size: tuple[int, int, int, int],
    dtype: str,
    format: torch.memory_format,
    names: Sequence[str],
    prepare: Prepare,
) -> Iterator[dict]:
    """Milliseconds of each pass by the algorithms of these names, and the choice of "auto"."""
    input, weight = tensors(size, dtype, format)
    grad = torch.randn_like(input)
    for pass_ in PASSES:
        problem = problem_of(input, weight, pass_=pass_)
        calls = {
            name: {
                "forward": partial(forward, problem, input, weight, None, False, name),
                "grad_input": partial(grad_input, problem, grad, weight, name),
                "grad_weight": partial(grad_weight, problem, grad, input, name),
            }[pass_]
            for name in names
        }
        choice = explain(problem).choice
        yield {"size": size, "dtype": dtype, "pass": pass_, "auto": choice} | measure(
            calls, prepare
        )


def tensors(
    size: tuple[int, int, int, int], dtype: str, format: torch.memory_format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and weight, whose outputs are about as large as the input."""
    batch, channels, side, kernel_size = size
    options: Any = {"device": "cuda", "dtype": DTYPES[dtype]}
    input = torch.randn(batch, channels, side, side, **options).contiguous(memory_format=format)
    return input, torch.randn(channels, 1, kernel_size, kernel_size, **options) / kernel_size


def stack(convolve: Call, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A row of equal convolutions."""
    for _ in range(PAPER_DEPTH):
        input = convolve(input, weight)
    return input


def pytorch(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    channels, _, kernel_size, _ = weight.shape
    return F.conv2d(input, weight, padding=kernel_size // 2, groups=channels)


def warm(call: Call) -> Call:
    """The call, with all that it runs compiled."""
    call()
    return call


def captured(call: Call) -> Call:
    """The replay of a CUDA graph of the call."""
    warm(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(calls: dict[str, Call], prepare: Prepare) -> dict[str, float]:
    """Median milliseconds of each call over rounds in which all take turns."""
    calls = {name: prepare(call) for name, call in calls.items()}
    counts = {
        name: max(1, min(50, int(1e3 * SECONDS_PER_ROUND / time(call, 1))))
        for name, call in calls.items()
    }
    rounds = [
        {name: time(call, counts[name]) for name, call in calls.items()} for _ in range(ROUNDS)
    ]
    return {name: median(times[name] for times in rounds) for name in calls}


def time(call: Call, count: int) -> float:
    """Milliseconds of a call, the mean of ``count`` in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


if __name__ == "__main__":
    main()

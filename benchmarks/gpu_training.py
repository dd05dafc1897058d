"""A training step of RepLKNet-31B on a CUDA GPU, by PyTorch's kernels and by "auto".

    python benchmarks/gpu_training.py [--model replknet_31b] [--batch 32] [--size 224]

Forward, cross entropy and backward; only the depthwise convolutions differ. Milliseconds are
medians of steps in turn; memory is the peak of PyTorch's allocator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import torch
import torch.nn.functional as F

import replknet
from replknet.ops import use

ENGINES = ("torch", "auto")
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="replknet_31b")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {vars(arguments)}")
    print(f"| numbers | depthwise convolutions | ms | images/s | peak MiB |\n|{'---|' * 5}")
    model = replknet.create_model(arguments.model, num_classes=1000).cuda().train()
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device="cuda")
    labels = torch.randint(1000, (arguments.batch,), device="cuda")
    for numbers in ("float32", "bfloat16 autocast"):

        def step(numbers: str = numbers) -> None:
            autocast = numbers != "float32"
            with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            model.zero_grad()

        for name, (milliseconds, peak) in compare(step).items():
            print(
                f"| {numbers} | {name} | {milliseconds:.1f} "
                f"| {1e3 * arguments.batch / milliseconds:.0f} | {peak:.0f} |",
                flush=True,
            )


def compare(step: Callable[[], None]) -> dict[str, tuple[float, float]]:
    """Median milliseconds and peak memory of a step with each engine."""
    peaks = {}
    for name in ENGINES:
        with use(name):
            step()  # compiles
            torch.cuda.reset_peak_memory_stats()
            step()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    times: dict[str, list[float]] = {name: [] for name in ENGINES}
    for _ in range(ROUNDS):
        for name in ENGINES:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with use(name):
                start.record()
                step()
                end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: (median(times[name]), peaks[name]) for name in ENGINES}


if __name__ == "__main__":
    main()

"""Print the figures that README and docs/performance.md give for the operator, beside PyTorch's.

    python benchmarks/operator_claims.py

Medians of interleaved runs, float32, "x" is the speedup over PyTorch's faster memory format: of the
operator, and for inference also of the layer that ``replknet.optimize`` makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from replknet.analysis.machine import describe_machine, fma_peak_gflops
from replknet.analysis.op_engines import Case, engines
from replknet.analysis.timing import interleave
from replknet.engine.allocator import keep_freed_memory

LAYERS = [(128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13)]
PYTORCH = ("pytorch nchw", "pytorch channels_last")
INFERENCE = ("replknet channels_last", "replknet optimized")
ROUNDS, MAX_SECONDS = 9, 6.0


def main() -> None:
    keep_freed_memory()  # lest new pages count for some engines only
    threads = torch.get_num_threads()
    print(", ".join(describe_machine().values()), f"{threads} threads", sep=", ")
    peak = fma_peak_gflops(threads)
    print("FMA peak:", "native core missing" if peak is None else f"{peak:.0f} GFLOP/s")
    for batch, train in ((1, False), (8, True)):
        print(f"\n{'forward + backward' if train else 'forward'}, batch {batch}, channels_last")
        for channels, size, kernel_size in LAYERS:
            case = Case(batch, channels, (size, size), (kernel_size, kernel_size))
            ours = ["replknet channels_last"] if train else INFERENCE
            print(f"  {case}: {compare(case, train, ours)}")
    print("\nforward, batch 1, NCHW, against PyTorch NCHW")
    case = Case(1, 128, (56, 56), (31, 31))
    print(f"  {case}: {compare(case, False, ['replknet nchw'], ['pytorch nchw'])}")
    print("\nforward, a large map, channels_last")
    case = Case(1, 128, (200, 320), (31, 31))
    print(f"  {case}: {compare(case, False, INFERENCE)}")
    kernels()
    scaling(threads)


def compare(
    case: Case,
    train: bool,
    ours: Sequence[str],
    rivals: Sequence[str] = PYTORCH,
) -> str:
    known = engines()
    calls = {}
    for name in (*rivals, *ours):
        prepare = known[name].train if train else known[name].forward
        assert prepare is not None
        calls[name] = prepare(case)
    times = {name: median(t) for name, t in interleave(calls, ROUNDS, MAX_SECONDS).items()}
    best = min(times[name] for name in rivals)
    listed = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in times.items())
    speedups = ", ".join(f"{best / times[name]:.1f}x" for name in ours)
    return f"{speedups} ({listed})"


def kernels() -> None:
    """What a large kernel costs beside a small one."""
    known = engines()
    calls = {
        f"{k}x{k}": known["replknet channels_last"].forward(Case(1, 128, (56, 56), (k, k)))
        for k in (3, 5, 7, 13, 31)
    }
    rivals = {name: known[name].forward(Case(1, 128, (56, 56), (5, 5))) for name in PYTORCH}
    samples = interleave({**calls, **rivals}, ROUNDS)
    times = {name: median(values) for name, values in samples.items()}
    large = times["31x31"]
    print("\n31x31 on 128x56x56, batch 1, channels_last, against smaller kernels")
    for name in calls:
        print(f"  {name}: {1e3 * times[name]:.3f} ms, 31x31 takes {large / times[name]:.2f} of it")
    best = min(times[name] for name in PYTORCH)
    print(f"  PyTorch's best 5x5: {1e3 * best:.3f} ms, 31x31 takes {large / best:.2f} of it")


def scaling(threads: int) -> None:
    """One thread against all of them."""
    print(f"\n{threads} threads over one thread, forward, batch 1, channels_last")
    for channels, size, kernel_size in LAYERS:
        case = Case(1, channels, (size, size), (kernel_size, kernel_size))
        call = engines()["replknet channels_last"].forward(case)

        def with_threads(number: int, call=call):
            def run():
                torch.set_num_threads(number)
                call()

            return run

        samples = interleave({"one": with_threads(1), "all": with_threads(threads)}, ROUNDS)
        print(f"  {case}: {median(samples['one']) / median(samples['all']):.2f}x")


if __name__ == "__main__":
    main()

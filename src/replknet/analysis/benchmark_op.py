"""Time one depthwise convolution in several engines, side by side in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Literal

from replknet.analysis.op_engines import Call, Case, Engine, chosen_algorithms, engines
from replknet.analysis.timing import interleave, quartiles, use_threads
from replknet.engine.allocator import keep_freed_memory

PassName = Literal["forward", "forward+backward"]

SUITES: dict[str, list[tuple[int, int, int]]] = {  # (channels, map size, kernel size)
    "replknet": [(128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13)],
    "paper": [
        (384, size, kernel_size)
        for size in (16, 32, 64)
        for kernel_size in (3, 5, 7, 9, 13, 17, 21, 27, 29, 31)
    ],
    "kernels": [(128, 56, k) for k in (3, 5, 7, 9, 11, 13, 17, 21, 25, 31, 41, 51)],
    "maps": [(128, size, 31) for size in (7, 14, 28, 56, 112, 224)],
}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to time.

    Attributes:
        suite: the four convolutions of RepLKNet, the latency grid of the paper's table on
            efficient large-kernel convolutions, a ladder of kernels on 56x56 maps, or a ladder of
            maps under 31x31 kernels.
        batch_size: images.
        passes: "forward", "forward+backward" or both.
        engines: names as ``engines()`` lists them; empty for all.
        threads: of every engine; 0 keeps PyTorch's setting.
        rounds: samples of each engine. They are interleaved: every engine once, then again.
        max_seconds: an engine takes no more samples of a case after this long.
    """

    suite: Literal["replknet", "paper", "kernels", "maps"] = "replknet"
    batch_size: int = 1
    passes: tuple[PassName, ...] = ("forward", "forward+backward")
    engines: tuple[str, ...] = ()
    threads: int = 0
    rounds: int = 15
    max_seconds: float = 5.0

    def __post_init__(self) -> None:
        known = engines()
        for name in self.engines:
            if name not in known:
                raise ValueError(f"engine {name!r} is none of {', '.join(known)}")
        if self.batch_size < 1 or self.rounds < 1:
            raise ValueError(
                f"batch_size and rounds must be positive, got {self.batch_size} and {self.rounds}"
            )

    def cases(self) -> list[Case]:
        """The convolutions of the suite."""
        return [
            Case(self.batch_size, channels, (size, size), (kernel_size, kernel_size))
            for channels, size, kernel_size in SUITES[self.suite]
        ]


@dataclass(frozen=True)
class Timing:
    """Times of one engine on one case, in milliseconds, and the rates they amount to."""

    engine: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    samples: int
    nominal_gflops: float  # operations of the definition, by second
    trimmed_gflops: float  # without those on padding
    peak_fraction: float | None  # of the FMA peak of these threads, by trimmed operations
    speedup: float | None  # over the faster memory format of PyTorch


@dataclass(frozen=True)
class CaseTimings:
    """All engines on one case."""

    case: Case
    passes: PassName
    auto: str  # algorithms that "auto" takes
    timings: tuple[Timing, ...]


def missing_engines(config: BenchmarkConfig) -> dict[str, str]:
    """Engines that were asked for and cannot run, with the reason."""
    return {engine.name: engine.missing for engine in _wanted(config) if engine.missing}


def run_benchmark(
    config: BenchmarkConfig,
    peak_gflops: float | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[CaseTimings]:
    """Time every case of the suite in every engine that is there, case by case.

    Freed memory stays with the process from then on, lest new pages count for some engines only.
    ``peak_gflops`` is the FMA peak of the machine with the threads in use.
    """
    keep_freed_memory()
    for case, passes in product(config.cases(), config.passes):
        progress(f"{case}, {passes}")
        with use_threads(config.threads):
            result = _run_case(case, passes, config, peak_gflops)
        yield result


def _wanted(config: BenchmarkConfig) -> list[Engine]:
    known = engines()
    return [known[name] for name in config.engines or known]


def _run_case(
    case: Case, passes: PassName, config: BenchmarkConfig, peak_gflops: float | None
) -> CaseTimings:
    calls: dict[str, Call] = {}
    for engine in _wanted(config):
        prepare = engine.forward if passes == "forward" else engine.train
        if prepare is not None and not engine.missing:
            calls[engine.name] = prepare(case)
    samples = interleave(calls, config.rounds, config.max_seconds)
    medians = {name: median(times) for name, times in samples.items()}
    rivals = [seconds for name, seconds in medians.items() if name.startswith("pytorch")]
    factor = 1 if passes == "forward" else 3
    nominal, trimmed = (factor * operations for operations in case.operations())
    timings = [
        Timing(
            engine=name,
            median_ms=1e3 * seconds,
            quartiles_ms=quartiles([1e3 * s for s in samples[name]]),
            samples=len(samples[name]),
            nominal_gflops=1e-9 * nominal / seconds,
            trimmed_gflops=1e-9 * trimmed / seconds,
            peak_fraction=1e-9 * trimmed / seconds / peak_gflops if peak_gflops else None,
            speedup=min(rivals) / seconds if rivals else None,
        )
        for name, seconds in medians.items()
    ]
    return CaseTimings(case, passes, chosen_algorithms(case), tuple(timings))

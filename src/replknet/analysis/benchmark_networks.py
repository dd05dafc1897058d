"""What the benchmarks of whole networks have in common: cases, interleaved times, memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from typing import Any, Protocol

import timm
import torch
from torch import Tensor, nn

from replknet.analysis.memory import peak_bytes, why_not_measurable
from replknet.analysis.timing import Call, interleave, quartiles, use_threads
from replknet.models import create_model, list_models


class Engine(Protocol):
    """Who computes; ``missing`` says why it cannot."""

    @property
    def name(self) -> str: ...

    @property
    def missing(self) -> str: ...


@dataclass(frozen=True)
class Prepared:
    """A call ready to be timed.

    Attributes:
        engine: its name.
        operations: additions and multiplications of the definition.
        difference: largest from PyTorch, in units that the case defines.
        split: seconds by kind of layer.
    """

    engine: str
    call: Call
    operations: int
    difference: float
    split: dict[str, float]


@dataclass(frozen=True)
class NetworkCase(ABC):
    """What all models and engines of one comparison have in common."""

    batch_size: int
    image_size: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.image_size
        return f"batch {self.batch_size}, {height}x{width}"

    def build(self, model: str, **options: Any) -> nn.Module:
        """The network, with random weights."""
        torch.manual_seed(0)
        config = timm.get_pretrained_cfg(model)
        if config is not None and config.fixed_input_size:
            options["img_size"] = self.image_size
        return create_model(model, **options)

    def image(self) -> Tensor:
        """The images, with random pixels."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch_size, 3, *self.image_size, generator=generator)

    @abstractmethod
    def prepare(self, model: str, engines: Sequence[str], rounds: int) -> Iterator[Prepared]:
        """A call of ``model`` in each engine, its result compared with PyTorch's.

        Raises:
            RuntimeError: An engine computes something else than PyTorch does.
        """

    @abstractmethod
    def call(self, model: str, engine: str) -> Call:
        """The call alone, to measure its memory."""


@dataclass(frozen=True)
class NetworkBenchmarkConfig(ABC):
    """What to time.

    Attributes:
        models: names of this package or of timm; weights are random.
        batch_sizes: images in a call.
        image_sizes: (height, width) in pixels.
        engines: names as ``known_engines`` lists them; empty for the default ones.
        threads: of every engine; 0 keeps PyTorch's setting.
        rounds: samples of each engine. They are interleaved: every engine once, then again.
        max_seconds: an engine takes no more samples of a case after this long.
        memory: measure each engine's peak memory, in a process of its own.
    """

    models: tuple[str, ...] = ("replknet_31b", "swin_base_patch4_window7_224")
    batch_sizes: tuple[int, ...] = (1,)
    image_sizes: tuple[tuple[int, int], ...] = ((224, 224),)
    engines: tuple[str, ...] = ()
    threads: int = 0
    rounds: int = 9
    max_seconds: float = 20.0
    memory: bool = True

    def __post_init__(self) -> None:
        known = self.known_engines()
        for name in self.engines:
            if name not in known:
                raise ValueError(f"engine {name!r} is none of {', '.join(known)}")
        for name in self.models:
            if name not in list_models() and not timm.is_model(name):
                raise ValueError(f"{name!r} is no model of this package or of timm")
        numbers = (*self.batch_sizes, *sum(self.image_sizes, ()), self.rounds)
        if min(numbers) < 1:
            raise ValueError(f"batch and image sizes and rounds must be positive, got {numbers}")

    @classmethod
    @abstractmethod
    def known_engines(cls) -> Mapping[str, Engine]:
        """Every engine by name."""

    def default_engines(self) -> Sequence[str]:
        """Names of the engines that run when none is named."""
        return list(self.known_engines())

    @abstractmethod
    def case(self, batch_size: int, image_size: tuple[int, int]) -> NetworkCase:
        """One comparison."""

    def cases(self) -> list[NetworkCase]:
        """Image sizes, then batch sizes; the models of one case are timed together."""
        return [self.case(batch, size) for size in self.image_sizes for batch in self.batch_sizes]

    def wanted(self) -> list[Engine]:
        """The engines asked for, whether they can run or not."""
        known = self.known_engines()
        return [known[name] for name in self.engines or self.default_engines()]

    def missing_engines(self) -> dict[str, str]:
        """Engines that were asked for and cannot run, with the reason."""
        return {engine.name: engine.missing for engine in self.wanted() if engine.missing}


@dataclass(frozen=True)
class NetworkTiming:
    """One model in one engine.

    Attributes:
        peak_fraction: operations of the definition, as a fraction of the machine's peak.
        peak_memory: bytes above those of the loaded model in the first calls.
        difference: largest from PyTorch, in units that the case defines.
        split: milliseconds by kind of layer.
    """

    model: str
    engine: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    samples: int
    images_per_second: float
    gflops: float
    peak_fraction: float | None
    peak_memory: int | None
    difference: float
    split: dict[str, float]

    @property
    def ours(self) -> bool:
        """Whether the engine is this package's."""
        return self.engine.startswith("replknet")


@dataclass(frozen=True)
class CaseTimings:
    """All models and engines on one case."""

    case: NetworkCase
    timings: tuple[NetworkTiming, ...]

    def best(self, model: str, *, ours: bool) -> NetworkTiming | None:
        """The fastest of a model: ours, or the best stock engine's."""
        able = [t for t in self.timings if t.model == model and t.ours == ours]
        return min(able, key=lambda timing: timing.median_ms, default=None)


def run_benchmark(
    config: NetworkBenchmarkConfig,
    peak_gflops: float | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[CaseTimings]:
    """Time case by case; all models and engines of a case are interleaved.

    Raises:
        RuntimeError: An engine computes something else than PyTorch does.
    """
    for case in config.cases():
        with use_threads(config.threads):
            result = _run_case(case, config, peak_gflops, progress)
        yield result


def _run_case(
    case: NetworkCase,
    config: NetworkBenchmarkConfig,
    peak_gflops: float | None,
    progress: Callable[[str], None],
) -> CaseTimings:
    engines = [engine.name for engine in config.wanted() if not engine.missing]
    keys = [(model, engine) for model in config.models for engine in engines]
    memory: dict[tuple[str, str], int | None] = dict.fromkeys(keys)
    if config.memory and not why_not_measurable():
        for model, engine in keys:
            progress(f"{case}: memory of {model} in {engine}")
            memory[model, engine] = _memory(case, model, engine)
    prepared: dict[tuple[str, str], Prepared] = {}
    for model in config.models:
        progress(f"{case}: preparing {model}")
        for each in case.prepare(model, engines, config.rounds):
            prepared[model, each.engine] = each
    progress(f"{case}: measuring")
    calls = {key: each.call for key, each in prepared.items()}
    samples = interleave(calls, config.rounds, config.max_seconds)
    timings = []
    for key, seconds in samples.items():
        each, middle = prepared[key], median(seconds)
        gflops = 1e-9 * each.operations / middle
        timings.append(
            NetworkTiming(
                model=key[0],
                engine=each.engine,
                median_ms=1e3 * middle,
                quartiles_ms=quartiles([1e3 * second for second in seconds]),
                samples=len(seconds),
                images_per_second=case.batch_size / middle,
                gflops=gflops,
                peak_fraction=gflops / peak_gflops if peak_gflops else None,
                peak_memory=memory[key],
                difference=each.difference,
                split={kind: 1e3 * value for kind, value in each.split.items()},
            )
        )
    return CaseTimings(case, tuple(timings))


def _memory(case: NetworkCase, model: str, engine: str) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_memory_of, case, model, engine, torch.get_num_threads()).result()


def _memory_of(case: NetworkCase, model: str, engine: str, threads: int) -> int:
    torch.set_num_threads(threads)
    call = case.call(model, engine)

    def twice() -> None:
        call()
        call()

    return peak_bytes(twice)

"""Time whole networks in several engines, side by side in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from replknet.analysis.benchmark_op import interleave, quartiles
from replknet.analysis.flops import count_flops
from replknet.analysis.memory import peak_bytes, why_not_measurable
from replknet.analysis.model_engines import ModelEngine, model_engines, torch_call
from replknet.analysis.model_split import time_split
from replknet.deploy import optimize, plain
from replknet.models import create_model, list_models

LARGEST_DIFFERENCE = 1e-3
"""Of an engine's outputs from PyTorch's, in units of their spread; more is another function."""


@dataclass(frozen=True)
class ModelBenchmarkConfig:
    """What to time.

    Attributes:
        models: names of this package or of timm; weights are random.
        task: classifiers with their heads, or backbones that return a map for each stage.
        batch_sizes: images in a call.
        image_sizes: (height, width) in pixels.
        engines: names as ``model_engines()`` lists them; empty for all.
        threads: of every engine; 0 keeps PyTorch's setting.
        rounds: samples of each engine. They are interleaved: every engine once, then again.
        max_seconds: an engine takes no more samples of a case after this long.
        memory: measure each engine's peak memory, in a process of its own.
    """

    models: tuple[str, ...] = ("replknet_31b", "swin_base_patch4_window7_224")
    task: Literal["classifier", "backbone"] = "classifier"
    batch_sizes: tuple[int, ...] = (1,)
    image_sizes: tuple[tuple[int, int], ...] = ((224, 224),)
    engines: tuple[str, ...] = ()
    threads: int = 0
    rounds: int = 9
    max_seconds: float = 20.0
    memory: bool = True

    def __post_init__(self) -> None:
        known = model_engines()
        for name in self.engines:
            if name not in known:
                raise ValueError(f"engine {name!r} is none of {', '.join(known)}")
        for name in self.models:
            if name not in list_models() and not timm.is_model(name):
                raise ValueError(f"{name!r} is no model of this package or of timm")
        numbers = (*self.batch_sizes, *sum(self.image_sizes, ()), self.rounds)
        if min(numbers) < 1:
            raise ValueError(f"batch and image sizes and rounds must be positive, got {numbers}")

    def cases(self) -> list[ModelCase]:
        """Image sizes, then batch sizes; the models of one case are timed together."""
        return [
            ModelCase(self.task, batch, size)
            for size in self.image_sizes
            for batch in self.batch_sizes
        ]


@dataclass(frozen=True)
class ModelCase:
    """What all models and engines of one comparison have in common."""

    task: Literal["classifier", "backbone"]
    batch_size: int
    image_size: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.image_size
        return f"{self.task}, batch {self.batch_size}, {height}x{width}"

    def build(self, model: str) -> nn.Module:
        """The network, with random weights."""
        torch.manual_seed(0)
        options: dict[str, Any] = {"features_only": True} if self.task == "backbone" else {}
        config = timm.get_pretrained_cfg(model)
        if config is not None and config.fixed_input_size:
            options["img_size"] = self.image_size
        return create_model(model, **options).eval()

    def image(self) -> Tensor:
        """The images, with random pixels."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch_size, 3, *self.image_size, generator=generator)


@dataclass(frozen=True)
class ModelTiming:
    """One model in one engine.

    Attributes:
        peak_fraction: multiply-adds of the definition, as a fraction of the machine's peak.
        peak_memory: bytes above those of the loaded model in the first calls.
        difference: largest from PyTorch's outputs, in units of their spread.
        split: milliseconds by kind of layer; ours only.
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


@dataclass(frozen=True)
class ModelCaseTimings:
    """All models and engines on one case."""

    case: ModelCase
    timings: tuple[ModelTiming, ...]

    def best_ms(self, model: str, *, ours: bool) -> float | None:
        """Least median of a model: ours, or the best stock engine's."""
        times = [
            timing.median_ms
            for timing in self.timings
            if timing.model == model and (timing.engine == "replknet") == ours
        ]
        return min(times, default=None)


def missing_model_engines(config: ModelBenchmarkConfig) -> dict[str, str]:
    """Engines that were asked for and cannot run, with the reason."""
    return {engine.name: engine.missing for engine in _wanted(config) if engine.missing}


def run_model_benchmark(
    config: ModelBenchmarkConfig,
    peak_gflops: float | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[ModelCaseTimings]:
    """Time every case; all its models and engines are interleaved.

    Raises:
        RuntimeError: An engine computes something else than PyTorch does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        return [_run_case(case, config, peak_gflops, progress) for case in config.cases()]
    finally:
        torch.set_num_threads(threads)


def _wanted(config: ModelBenchmarkConfig) -> list[ModelEngine]:
    known = model_engines()
    return [known[name] for name in config.engines or known]


def _run_case(
    case: ModelCase,
    config: ModelBenchmarkConfig,
    peak_gflops: float | None,
    progress: Callable[[str], None],
) -> ModelCaseTimings:
    image, calls, differences = case.image(), {}, {}
    operations: dict[str, int] = {}
    splits: dict[tuple[str, str], dict[str, float]] = {}
    memory: dict[tuple[str, str], int | None] = {}
    for name in config.models:
        model = case.build(name)
        reference = plain(model)
        expected = torch_call(reference, image)()
        operations[name] = 2 * count_flops(reference, image.shape)
        for engine in _wanted(config):
            if engine.missing:
                continue
            progress(f"{case}: preparing {name} in {engine.name}")
            key = (name, engine.name)
            calls[key] = engine.prepare(model, image)
            differences[key] = _difference(calls[key](), expected, key)
            memory[key] = _memory(case, *key) if config.memory else None
            if engine.name == "replknet":
                fast = optimize(model)
                splits[key] = time_split(fast, torch_call(fast, image), config.rounds)
    progress(f"{case}: measuring")
    samples = interleave(calls, config.rounds, config.max_seconds)
    timings = []
    for (name, engine_name), seconds in samples.items():
        key, middle = (name, engine_name), median(seconds)
        gflops = 1e-9 * operations[name] / middle
        timings.append(
            ModelTiming(
                model=name,
                engine=engine_name,
                median_ms=1e3 * middle,
                quartiles_ms=quartiles([1e3 * second for second in seconds]),
                samples=len(seconds),
                images_per_second=case.batch_size / middle,
                gflops=gflops,
                peak_fraction=gflops / peak_gflops if peak_gflops else None,
                peak_memory=memory[key],
                difference=differences[key],
                split={kind: 1e3 * value for kind, value in splits.get(key, {}).items()},
            )
        )
    return ModelCaseTimings(case, tuple(timings))


def _difference(
    outputs: Sequence[Tensor], expected: Sequence[Tensor], key: tuple[str, str]
) -> float:
    pairs = zip(outputs, expected, strict=True)
    worst = max(((a - b).abs().max() / b.std()).item() for a, b in pairs)
    if not worst <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"{key[0]} in {key[1]} differs by {worst:.1e} of the outputs' spread")
    return worst


def _memory(case: ModelCase, model: str, engine: str) -> int | None:
    if why_not_measurable():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_memory_of, case, model, engine, torch.get_num_threads()).result()


def _memory_of(case: ModelCase, model: str, engine: str, threads: int) -> int:
    torch.set_num_threads(threads)
    call = model_engines()[engine].prepare(case.build(model), case.image())

    def twice() -> None:
        call()
        call()

    return peak_bytes(twice)

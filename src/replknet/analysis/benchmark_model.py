"""Time the inference of whole networks in several engines, side by side in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from replknet.analysis.benchmark_networks import NetworkBenchmarkConfig, NetworkCase, Prepared
from replknet.analysis.flops import count_flops
from replknet.analysis.model_engines import Call, ModelEngine, model_engines, torch_call
from replknet.analysis.model_split import time_split
from replknet.deploy import optimize, plain

LARGEST_DIFFERENCE = 1e-3
"""Of an engine's outputs from PyTorch's, in units of their spread; more is another function."""

Task = Literal["classifier", "backbone"]


@dataclass(frozen=True)
class ModelBenchmarkConfig(NetworkBenchmarkConfig):
    """What to time, see ``NetworkBenchmarkConfig``.

    Attributes:
        task: classifiers with their heads, or backbones that return a map for each stage.
    """

    task: Task = "classifier"

    @classmethod
    def known_engines(cls) -> Mapping[str, ModelEngine]:
        return model_engines()

    def case(self, batch_size: int, image_size: tuple[int, int]) -> ModelCase:
        return ModelCase(batch_size, image_size, self.task)


@dataclass(frozen=True)
class ModelCase(NetworkCase):
    """Inference on a batch of images."""

    task: Task

    def __str__(self) -> str:
        return f"{self.task}, {super().__str__()}"

    def build(self, model: str, **options: Any) -> nn.Module:
        if self.task == "backbone":
            options["features_only"] = True
        return super().build(model, **options).eval()

    def prepare(self, model: str, engines: Sequence[str], rounds: int) -> Iterator[Prepared]:
        network, image = self.build(model), self.image()
        reference = plain(network)
        expected = torch_call(reference, image)()
        operations = 2 * count_flops(reference, image.shape)
        for engine in engines:
            call = model_engines()[engine].prepare(network, image)
            difference = _difference(call(), expected)
            if not difference <= LARGEST_DIFFERENCE:
                raise RuntimeError(
                    f"{model} in {engine} differs by {difference:.1e} of the outputs' spread"
                )
            split = {}
            if engine == "replknet":
                fast = optimize(network)
                split = time_split(fast, torch_call(fast, image), rounds)
            yield Prepared(engine, call, operations, difference, split)

    def call(self, model: str, engine: str) -> Call:
        return model_engines()[engine].prepare(self.build(model), self.image())


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(outputs, expected, strict=True)
    return max(((a - b).abs().max() / b.std()).item() for a, b in pairs)

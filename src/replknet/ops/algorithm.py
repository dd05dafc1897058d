"""What every convolution algorithm offers, and the table of those there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from replknet.ops.problem import Problem

Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The output for an input, a weight and a bias."""

Gradient = Callable[[Tensor, Tensor], Tensor]
"""One gradient for that of the output, and the weight or the input."""


@dataclass(frozen=True)
class Support:
    """Whether an algorithm can compute a problem, and why not."""

    ok: bool
    reason: str = ""


class Algorithm(Protocol):
    """One way to compute a depthwise convolution and its two gradients.

    ``input`` and the results are (N, C, H, W) in the memory format of ``problem.layout``;
    ``weight`` is (C, 1, Kh, Kw); ``bias`` is (C,). Each method is only called with a problem
    that ``supports`` accepts, of the matching ``pass_``.
    """

    name: str
    folds_relu: bool
    """Whether ``forward`` clamps each output on its way to memory, not in a pass of its own."""

    def supports(self, problem: Problem) -> Support:
        """Say whether this algorithm computes ``problem``; never raises."""
        ...

    def cost(self, problem: Problem) -> float:
        """Predict the seconds that ``problem`` takes with the current number of threads."""
        ...

    def forward(
        self, problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
    ) -> Tensor:
        """Convolve, add the bias, and clamp at zero when ``relu``."""
        ...

    def grad_input(self, problem: Problem, grad_output: Tensor, weight: Tensor) -> Tensor:
        """Gradient with respect to the input."""
        ...

    def grad_weight(self, problem: Problem, grad_output: Tensor, input: Tensor) -> Tensor:
        """Gradient with respect to the weight, summed over the batch."""
        ...


ALGORITHMS: dict[str, Algorithm] = {}


def register(algorithm: Algorithm) -> None:
    """Add an algorithm to the table, under its name."""
    ALGORITHMS[algorithm.name] = algorithm

"""Forward passes with filters that never change: what can be computed from them is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from replknet.ops.choose import choose
from replknet.ops.native import NativeAlgorithm, PreparedFilter
from replknet.ops.problem import Problem
from replknet.ops.trim import trim

Forward = Callable[[Tensor, Tensor | None, bool], Tensor]
"""From the input, in the problem's layout, the bias and whether to clamp at zero, the output."""


def prepare_forward(problem: Problem, weight: Tensor) -> Forward:
    """Fastest forward pass of ``problem`` with the filters ``weight`` (C, 1, Kh, Kw).

    The result holds the filters packed or transformed, and is valid for any batch and as long as
    ``weight`` does not change.
    """
    problem, taps = trim(problem)
    weight = weight[:, :, taps.top : taps.bottom, taps.left : taps.right].contiguous()
    algorithm = choose(problem)
    if isinstance(algorithm, NativeAlgorithm):
        prepared = algorithm.prepare(problem, weight)
        if prepared.data.numel():  # nothing where the kernel reads the weight itself
            return lambda input, bias, relu: algorithm.forward_prepared(
                input,
                PreparedFilter(_for(problem, input.shape[0]), prepared.isa, prepared.data),
                bias,
                relu,
            )
    return lambda input, bias, relu: algorithm.forward(
        _for(problem, input.shape[0]), input, weight, bias, relu
    )


@lru_cache(maxsize=4096)
def _for(problem: Problem, batch: int) -> Problem:
    return replace(problem, batch=batch)

"""Forward passes with filters that never change: packed, and their spectra kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from replknet.ops import _binary
from replknet.ops.algorithm import ALGORITHMS, Algorithm
from replknet.ops.choose import choose, requested
from replknet.ops.native import NativeAlgorithm, PreparedFilters
from replknet.ops.problem import Problem
from replknet.ops.trim import trim

FILTER_LANES = _binary.FILTER_LANES

# What spectra must save in a call for each byte that they take until the last.
SPECTRA_SECONDS = 2e-11


def pack_filters(weight: Tensor) -> Tensor:
    """Filters (C, 1, Kh, Kw) as (groups, Kh, Kw, FILTER_LANES).

    The last group is filled up with zeros.
    """
    channels, _, *kernel_size = weight.shape
    groups = -(-channels // FILTER_LANES)
    missing = groups * FILTER_LANES - channels
    filled = F.pad(weight.detach()[:, 0], (0, 0, 0, 0, 0, missing))
    return filled.view(groups, FILTER_LANES, *kernel_size).permute(0, 2, 3, 1).contiguous()


def unpack_filters(packed: Tensor, channels: int) -> Tensor:
    """The filters (C, 1, Kh, Kw) of packed ones."""
    return packed.permute(0, 3, 1, 2).flatten(0, 1)[:channels, None]


@dataclass(frozen=True)
class Forward:
    """A forward pass whose filters do not change, for any batch."""

    problem: Problem
    algorithm: Algorithm
    filters: PreparedFilters | Tensor
    """As a native algorithm prepared them, or (C, 1, Kh, Kw)."""

    def of_batch(self, batch: int, relu: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The output of so many images and a bias, computed with the current number of threads.

        The input is in the problem's layout; ``relu`` clamps at zero.
        """
        problem, filters = self.for_batch(batch), self.filters
        if isinstance(filters, PreparedFilters):
            native = cast(NativeAlgorithm, self.algorithm)
            return native.forward_prepared_of(problem, filters, relu)
        forward = self.algorithm.forward
        return lambda input, bias: forward(problem, input, filters, bias, relu)

    def for_batch(self, batch: int) -> Problem:
        return _for(self.problem, batch)


def prepare_forward(problem: Problem, filters: Tensor, relu: bool = False) -> Forward:
    """Fastest forward pass of ``problem`` with packed filters.

    It holds their spectra where the algorithm has some. ``relu``: its calls clamp at zero.
    """
    problem, taps = trim(problem)
    filters = filters[:, taps.top : taps.bottom, taps.left : taps.right].contiguous()
    algorithm = _choose(problem, relu)
    if isinstance(algorithm, NativeAlgorithm):
        return Forward(problem, algorithm, algorithm.prepare(problem, filters))
    return Forward(problem, algorithm, unpack_filters(filters, problem.channels))


def _choose(problem: Problem, relu: bool) -> Algorithm:
    """The choice for ``problem``; without spectra where these save too little for their memory."""
    chosen, direct = choose(problem, relu=relu), ALGORITHMS["direct"]
    if requested("auto") != "auto" or not isinstance(chosen, NativeAlgorithm):
        return chosen
    if (spectra := chosen.spectrum_bytes(problem)) and direct.supports(problem).ok:
        saved = direct.cost(problem) - chosen.cost(problem)
        return chosen if saved > SPECTRA_SECONDS * spectra else direct
    return chosen


@lru_cache(maxsize=4096)
def _for(problem: Problem, batch: int) -> Problem:
    return replace(problem, batch=batch)

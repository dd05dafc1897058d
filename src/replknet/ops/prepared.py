"""Forward passes with filters that never change: packed, and their spectra kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor

from replknet.ops import _binary
from replknet.ops.choose import choose
from replknet.ops.native import NativeAlgorithm
from replknet.ops.problem import Problem
from replknet.ops.trim import trim

Forward = Callable[[Tensor, Tensor | None, bool], Tensor]
"""From the input, in the problem's layout, the bias and whether to clamp at zero, the output."""
FILTER_LANES = _binary.FILTER_LANES


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


def prepare_forward(problem: Problem, filters: Tensor) -> Forward:
    """Fastest forward pass of ``problem`` with packed filters.

    The result is valid for any batch and as long as the filters do not change. It holds their
    spectra where the algorithm has some.
    """
    problem, taps = trim(problem)
    filters = filters[:, taps.top : taps.bottom, taps.left : taps.right].contiguous()
    algorithm = choose(problem)
    if isinstance(algorithm, NativeAlgorithm):
        prepared = algorithm.prepare(problem, filters)
        return lambda input, bias, relu: algorithm.forward_prepared(
            _for(problem, input.shape[0]), input, prepared, bias, relu
        )
    weight = unpack_filters(filters, problem.channels)
    return lambda input, bias, relu: algorithm.forward(
        _for(problem, input.shape[0]), input, weight, bias, relu
    )


@lru_cache(maxsize=4096)
def _for(problem: Problem, batch: int) -> Problem:
    return replace(problem, batch=batch)

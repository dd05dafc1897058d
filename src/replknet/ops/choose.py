"""Which algorithm computes a problem, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from replknet.ops import cuda_choice
from replknet.ops.algorithm import ALGORITHMS, Algorithm
from replknet.ops.problem import Problem
from replknet.ops.torch_conv import TorchConv, best_layout
from replknet.ops.trim import trim

# What a call takes beside the algorithms, and what each pass adds when gradients are wanted.
CALL_SECONDS, TRAINED_PASS_SECONDS = 5e-6, 1e-5
# For each number that is clamped at zero in a pass of its own.
RELU_SECONDS = 1.5e-10

_in_use: ContextVar[str | None] = ContextVar("replknet_algorithm", default=None)


@contextmanager
def use(algorithm: str) -> Iterator[None]:
    """Compute the depthwise convolutions of a ``with`` block by one algorithm.

    Holds for the forward and backward passes that run inside the block, in this thread or
    asynchronous task. On a GPU, whose backward passes PyTorch runs in threads of its own, a
    backward pass goes by the block of its forward pass. "auto" chooses again. The environment
    variable ``REPLKNET_ALGORITHM``, read at the first call, does the same for a whole process, and
    ``algorithm=`` for a call.

    Raises:
        ValueError: there is no algorithm of that name.
    """
    token = _in_use.set(known_name(algorithm))
    try:
        yield
    finally:
        _in_use.reset(token)


def requested(algorithm: str) -> str:
    """What is asked for, by the call, else by ``use``, else by the environment; or "auto"."""
    if algorithm != "auto":
        return known_name(algorithm)
    in_use = _in_use.get()
    if in_use is not None:
        return in_use
    return _by_environment()


@lru_cache(maxsize=1)
def _by_environment() -> str:
    """Read once: looking it up takes a tenth of a short call."""
    return known_name(os.environ.get("REPLKNET_ALGORITHM", "auto"), "REPLKNET_ALGORITHM")


def known_name(algorithm: str, source: str = "algorithm") -> str:
    """``algorithm`` if there is one of that name, or "auto"."""
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        names = ", ".join(["auto", *ALGORITHMS])
        raise ValueError(f"{source} must be one of {names}; got {algorithm!r}")
    return algorithm


def choose(problem: Problem, algorithm: str = "auto", relu: bool = False) -> Algorithm:
    """The algorithm for ``problem``: the one named, or the one with the least predicted cost.

    ``relu``: the output is clamped at zero, which some algorithms do on the way to memory.

    Raises:
        ValueError: there is no algorithm of that name.
        NotImplementedError: the one that is asked for cannot compute this problem.
    """
    name = requested(algorithm)
    if name == "auto":
        return ALGORITHMS[_cheapest(problem, torch.get_num_threads(), relu)]
    support = ALGORITHMS[name].supports(problem)
    if not support.ok:
        able = ", ".join(a.name for a in ALGORITHMS.values() if a.supports(problem).ok)
        raise NotImplementedError(
            f"algorithm {name!r} cannot compute this {problem.pass_} pass: {support.reason}; "
            f"auto and these can: {able}"
        )
    return ALGORITHMS[name]


@lru_cache(maxsize=4096)
def _cheapest(problem: Problem, threads: int, relu: bool = False) -> str:
    able = [algorithm for algorithm in ALGORITHMS.values() if algorithm.supports(problem).ok]
    if problem.device == "cuda":
        return cuda_choice.fastest(problem, {algorithm.name for algorithm in able})
    if problem.device != "cpu":  # nothing was measured there: PyTorch's own
        return "torch"

    return min(able, key=lambda algorithm: _seconds(algorithm, problem, relu)).name


def _seconds(algorithm: Algorithm, problem: Problem, relu: bool) -> float:
    """Predicted for a call on a CPU."""
    clamped = prod(problem.output_shape) if relu and not algorithm.folds_relu else 0
    return algorithm.cost(problem) + RELU_SECONDS * clamped


def pytorch_alone_is_faster(problems: Sequence[Problem]) -> bool:
    """Whether to leave all these passes to ``F.conv2d``, called as it is.

    On CPUs when it is predicted to be faster; on GPUs when it is the choice for each. What ``use``
    asks for plays no part.
    """
    threads = torch.get_num_threads()
    if problems[0].device != "cpu":
        return all(
            _cheapest(problem, threads) == "torch"
            and trim(problem)[0] == problem
            and best_layout(problem) == problem.layout
            for problem in problems
        )
    alone = 0.0
    chosen = CALL_SECONDS if len(problems) == 1 else TRAINED_PASS_SECONDS * len(problems)
    for problem in problems:
        if trim(problem)[0] != problem:  # PyTorch computes the idle taps too
            return False
        alone += TorchConv(problem.layout).cost(problem)
        chosen += ALGORITHMS[_cheapest(problem, threads)].cost(problem)
    return alone < chosen


@dataclass(frozen=True)
class Candidate:
    """One algorithm's standing for a problem."""

    name: str
    ok: bool
    reason: str  # why not, when not ok
    seconds: float | None  # predicted, when ok and the device is the CPU

    def __str__(self) -> str:
        if not self.ok:
            return f"{self.name:<10} no   {self.reason}"
        cost = "" if self.seconds is None else f"{1e3 * self.seconds:.3f} ms predicted"
        return f"{self.name:<10} yes  {cost}".rstrip()


@dataclass(frozen=True)
class Explanation:
    """Every algorithm's standing for a problem, and the one that computes it."""

    problem: Problem
    computed: Problem  # without the taps of the kernel that only ever meet padding
    candidates: tuple[Candidate, ...]
    choice: str | None  # None when the algorithm asked for cannot compute the problem
    request: str

    def __str__(self) -> str:
        problem = self.problem
        kernel = "x".join(map(str, problem.kernel_size))
        lines = [
            f"{problem.pass_} of a {kernel} depthwise convolution, input ({problem.batch}, "
            f"{problem.channels}, {problem.height}, {problem.width}), {problem.layout}, "
            f"{str(problem.dtype).removeprefix('torch.')}, {problem.device}"
        ]
        if self.computed.kernel_size != problem.kernel_size:
            trimmed = "x".join(map(str, self.computed.kernel_size))
            lines.append(f"only {trimmed} of its taps ever meet the map")
        for candidate in self.candidates:
            mark = "->" if candidate.name == self.choice else "  "
            lines.append(f"{mark} {candidate}")
        if self.request != "auto":
            lines.append(f"{self.request} is asked for by `use` or REPLKNET_ALGORITHM")
        return "\n".join(lines)


def explain(problem: Problem, relu: bool = False) -> Explanation:
    """Say for every algorithm whether it computes ``problem``, why not, and its predicted cost.

    ``problem_of`` makes the problem from the arguments of a call; ``relu``: of one that clamps its
    output at zero. ``print`` the result for a table.
    """
    request = requested("auto")
    computed, _ = trim(problem)
    candidates = []
    for algorithm in ALGORITHMS.values():
        support = algorithm.supports(computed)
        predictable = support.ok and computed.device == "cpu"
        seconds = _seconds(algorithm, computed, relu) if predictable else None
        candidates.append(Candidate(algorithm.name, support.ok, support.reason, seconds))
    able = {candidate.name for candidate in candidates if candidate.ok}
    choice = choose(computed, relu=relu).name if request == "auto" or request in able else None
    return Explanation(problem, computed, tuple(candidates), choice, request)

"""Residual blocks in training, some of them in one native call.

Between two layers the caches hold weights and maps, and what Python and PyTorch need to call the
next one comes from memory: a tenth of a training step went by that way. Within a call batch norms
are also added to each other, and to the input of their block, while they are written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from replknet.ops import _binary
from replknet.ops.activation import ACTIVATIONS
from replknet.ops.arguments import layout_of, make_problem
from replknet.ops.branch import Branch, gradients_by_pytorch
from replknet.ops.choose import choose, requested
from replknet.ops.eager import nothing_listens
from replknet.ops.matmul import native_pays, suits_native
from replknet.ops.native import NativeAlgorithm, check, library
from replknet.ops.problem import Pass
from replknet.ops.times import collected
from replknet.ops.trim import Taps, trim


@dataclass(frozen=True)
class NativeSeconds:
    """What one pass of a branch took in the native core."""

    norms: float
    """With activations and sums."""
    products: float
    kernels: list[tuple[torch.Size, float]]
    """Size and time of each depthwise convolution."""


_times: ContextVar[list[NativeSeconds] | None] = ContextVar("replknet_branch_times", default=None)


def native_seconds() -> AbstractContextManager[list[NativeSeconds]]:
    """A list to which every pass of a branch in the ``with`` block adds its times.

    Branches are native there also under modes that watch operators, which do not see them. Holds in
    this thread or asynchronous task.
    """
    return collected(_times)


def may_pay(x: Tensor) -> bool:
    """Whether there may be a branch that ``pays`` for ``x``: quick to tell."""
    observable = nothing_listens() or _times.get() is not None
    return (
        observable
        and torch.is_grad_enabled()
        and suits_native(x)
        and x.ndim == 4
        and layout_of(x) == "NHWC"
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def pays(x: Tensor, branch: Branch) -> bool:
    """Whether ``add_branches`` computes this branch of ``x``, and faster than layer by layer.

    For maps that ``may_pay``.
    """
    parameters = branch.parameters
    return (
        native_pays(x.numel() // x.shape[1], *branch.first.shape[:2])
        and suits_native(*parameters)
        and all(tensor.requires_grad and tensor.is_contiguous() for tensor in parameters)
        and all(statistics.suits_native() for statistics in branch.statistics)
        and _kernels(x, branch) is not None
    )


def add_branches(x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """Residual blocks one after the other: each adds its branch to what it gets.

    Moves the statistics. What the blocks keep for the backward pass is freed when all of them have
    their gradients.

    Args:
        x: (N, C, H, W); the branches are such that each ``pays`` for it.
        branches: At least one.
    """
    parameters = (parameter for branch in branches for parameter in branch.parameters)
    output: Tensor = _Branches.apply(x, branches, *parameters)
    return output


class _Kernel(NamedTuple):
    """A depthwise convolution by native algorithms: the taps that meet the map, the passes."""

    taps: Taps
    passes: tuple[_binary.ProblemStruct, ...]


def _kernels(x: Tensor, branch: Branch) -> list[_Kernel] | None:
    """The depthwise convolutions of the branch; None if a pass is not to be native."""
    size = (x.shape[0], branch.first.shape[0], *x.shape[2:])
    request, threads = requested("auto"), torch.get_num_threads()
    kernels = []
    for weight in branch.kernels:
        kernel = _kernel(size, tuple(weight.shape[2:]), request, threads)
        if kernel is None:
            return None
        kernels.append(kernel)
    return kernels


@lru_cache(maxsize=1024)
def _kernel(
    size: Sequence[int], kernel_size: tuple[int, int], request: str, threads: int
) -> _Kernel | None:
    """One of them, for maps of that size; ``threads`` is what the structs will hold."""
    height, width = (size // 2 for size in kernel_size)
    border = (height, height, width, width)
    passes = []
    for pass_ in get_args(Pass):
        problem, taps = trim(
            make_problem(
                pass_, size, kernel_size, (1, 1), border, (1, 1), torch.float32, "NHWC", "cpu"
            )
        )
        algorithm = choose(problem, request)
        if not isinstance(algorithm, NativeAlgorithm):
            return None
        passes.append(algorithm.struct(problem))
    return _Kernel(taps, tuple(passes))


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branches: Sequence[Branch], *parameters: Tensor) -> Tensor:
        structs = (_binary.BranchStruct * len(branches))()
        used, kept = [], []  # `used` holds what the structs point to
        for branch, struct in zip(branches, structs, strict=True):
            kernels = cast("list[_Kernel]", _kernels(x, branch))
            trimmed = _trimmed(branch, kernels)
            statistics = x.new_empty(2 * sum(len(weight) for weight, _ in branch.norms))
            _fill(struct, x, trimmed, kernels, statistics)
            maps = x.new_empty(library().rk_branch_map_floats(struct))
            output = torch.empty_like(x)
            struct.maps, struct.output = maps.data_ptr(), output.data_ptr()
            used.append(trimmed)
            kept.append((x, maps, statistics))
            x = output
        with _timed(structs, branches):
            check(library().rk_branches_forward(structs, len(branches)))
        ctx.save_for_backward(*(tensor for tensors in kept for tensor in tensors), *parameters)
        ctx.branches = branches
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        kept = [tuple(islice(saved, 3)) for _ in ctx.branches]
        branches = [branch.of(saved) for branch in ctx.branches]
        x = kept[0][0]
        kernels = [_kernels(x, branch) for branch in branches]
        if torch.is_grad_enabled() or None in kernels or not suits_native(grad):
            to_x, *to_parameters = gradients_by_pytorch(x, branches, grad)
            return to_x, None, *to_parameters
        native = list(zip(branches, cast("list[list[_Kernel]]", kernels), strict=True))
        structs = (_binary.BranchStruct * len(branches))()
        used, gradients = [], []
        for (branch, of_branch), tensors, struct in zip(native, kept, structs, strict=True):
            input, maps, statistics = tensors
            trimmed = _trimmed(branch, of_branch)
            gradient = trimmed.of([torch.empty_like(p) for p in trimmed.parameters])
            _fill(struct, input, trimmed, of_branch, statistics, gradient)
            struct.maps = maps.data_ptr()
            used.append(trimmed)
            gradients.append(gradient)
        grad, to_x = grad.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        with _timed(structs, branches):
            addresses = grad.data_ptr(), to_x.data_ptr()
            check(library().rk_branches_backward(structs, len(structs), *addresses))
        whole = (_spread(g, *pair) for g, pair in zip(gradients, native, strict=True))
        return to_x, None, *(tensor for gradient in whole for tensor in gradient.parameters)


@contextmanager
def _timed(
    structs: ctypes.Array[_binary.BranchStruct], branches: Sequence[Branch]
) -> Iterator[None]:
    """Adds what the native call in the ``with`` block takes to the list of ``native_seconds``."""
    times = _times.get()
    if times is None:
        yield
        return
    taken = [(ctypes.c_double * _binary.KINDS)() for _ in branches]
    for struct, seconds in zip(structs, taken, strict=True):
        struct.seconds = seconds
    yield
    for branch, (norms, products, *kernels) in zip(branches, taken, strict=True):
        sizes = (weight.shape[2:] for weight in branch.kernels)
        times.append(NativeSeconds(norms, products, list(zip(sizes, kernels, strict=False))))


def _trimmed(branch: Branch, kernels: Sequence[_Kernel]) -> Branch:
    """The branch with those taps of its kernels that meet the map."""
    pairs = zip(kernels, branch.kernels, strict=True)
    return replace(branch, kernels=tuple(kernel.taps.of(weight) for kernel, weight in pairs))


def _spread(gradient: Branch, branch: Branch, kernels: Sequence[_Kernel]) -> Branch:
    """The gradient for whole kernels: zero at taps that meet no map."""
    triples = zip(kernels, gradient.kernels, branch.kernels, strict=True)
    spread = tuple(kernel.taps.spread(g, weight.shape) for kernel, g, weight in triples)
    return replace(gradient, kernels=spread)


def _fill(
    struct: _binary.BranchStruct,
    x: Tensor,
    branch: Branch,
    kernels: Sequence[_Kernel],
    statistics: Tensor,
    gradient: Branch | None = None,
) -> None:
    """Fill in all but the output and the maps, of tensors that must outlive the struct.

    ``statistics`` has a mean and a variance for each channel of each norm.
    """
    struct.width, struct.channels = branch.first.shape[:2]
    struct.rows, struct.images = x.numel() // x.shape[1], len(x)
    struct.activation, struct.threads = ACTIVATIONS[branch.activation], torch.get_num_threads()
    struct.first, struct.second = branch.first.data_ptr(), branch.second.data_ptr()
    struct.input = x.data_ptr()
    if branch.image_scales is not None:
        struct.image_scales = branch.image_scales.data_ptr()
    depthwise = [
        _binary.DepthwiseStruct(*map(ctypes.pointer, kernel.passes), weight.data_ptr())
        for kernel, weight in zip(kernels, branch.kernels, strict=True)
    ]
    if gradient is not None:
        struct.grad_first = gradient.first.data_ptr()
        struct.grad_second = gradient.second.data_ptr()
        for kernel, to_weight in zip(depthwise, gradient.kernels, strict=True):
            kernel.weight_gradient = to_weight.data_ptr()
    for name, kernel in zip(("large", "small"), depthwise, strict=False):
        setattr(struct, name, ctypes.pointer(kernel))
    address = statistics.data_ptr()
    places = (0, 1, *range(2, 2 + len(kernels)), 4)
    for i, (place, (weight, bias)) in enumerate(zip(places, branch.norms, strict=True)):
        kept, norm = branch.statistics[i], struct.norms[place]
        norm.weight, norm.bias = weight.data_ptr(), bias.data_ptr()
        norm.mean, norm.variance = address, address + weight.nbytes
        address += 2 * weight.nbytes
        if kept.mean is not None and kept.variance is not None:
            norm.running_mean, norm.running_variance = (
                kept.mean.data_ptr(),
                kept.variance.data_ptr(),
            )
        if kept.batches is not None:
            norm.batches = kept.batches.data_ptr()
        if gradient is not None:
            norm.grad_weight, norm.grad_bias = (t.data_ptr() for t in gradient.norms[i])
        norm.eps, norm.momentum = kept.eps, kept.momentum

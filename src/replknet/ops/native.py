"""Algorithms "direct" and "fft": the native core."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor

from replknet.ops import _binary
from replknet.ops.algorithm import Convolve, Gradient, Support
from replknet.ops.cost import predict
from replknet.ops.problem import Problem

_PASSES = {
    "forward": _binary.FORWARD,
    "grad_input": _binary.GRAD_INPUT,
    "grad_weight": _binary.GRAD_WEIGHT,
}
_CPU = torch.device("cpu")  # whatever the default device is
_DTYPES = {torch.float32: _binary.F32, torch.bfloat16: _binary.BF16, torch.float16: _binary.F16}


@dataclass(frozen=True)
class PreparedFilters:
    """Packed filters of a forward problem, and their spectra, for the instruction set ``isa``."""

    packed: Tensor
    spectra: Tensor | None
    isa: str


class NativeAlgorithm:
    """One algorithm of the native core.

    Reads and writes tensors of any strides in float32, bfloat16 or float16 and computes in float32.
    Uses as many threads as PyTorch and holds no lock meanwhile. Its workspace is bounded for each
    thread and freed before a call returns.
    """

    folds_relu = True

    def __init__(self, name: str, code: int) -> None:
        self.name = name
        self._code = code

    def supports(self, problem: Problem) -> Support:
        if _binary.library is None:
            return Support(False, _binary.reason_missing)
        if problem.device != "cpu":
            return Support(False, f"the native core runs on the CPU, not on {problem.device}")
        if problem.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            return Support(False, f"the native core computes {known}, not {problem.dtype}")
        if library().rk_supports(_struct(problem, self._code, 1)):
            return Support(
                False,
                f"the native {self.name} algorithm has no kernel for stride {problem.stride}, "
                f"dilation {problem.dilation}, kernel {problem.kernel_size}",
            )
        return Support(True)

    def cost(self, problem: Problem) -> float:
        output_h, output_w = problem.output_size
        direct = self._code == _binary.DIRECT
        pixels = output_h * output_w if direct else problem.height * problem.width
        return predict(self.name, problem, problem.layout, sqrt(pixels))

    def forward(
        self, problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
    ) -> Tensor:
        output = _empty_output(problem)
        bias = None if bias is None else _float32(bias)
        struct = _struct(problem, self._code, torch.get_num_threads(), relu)
        struct = _with_strides(struct, problem, input, output)
        _compute(struct, input, _float32(weight), None, bias, output)
        return output

    def forward_of(self, problem: Problem, relu: bool) -> Convolve:
        """``forward`` of ``problem`` for tensors to come, with the current number of threads.

        They are float32, the input has the strides of the problem, weight and bias are contiguous.
        """
        return _forward(problem, self._code, torch.get_num_threads(), relu)

    def grad_input_of(self, problem: Problem) -> Gradient:
        """``grad_input`` of ``problem`` for tensors to come, as ``forward_of``."""
        struct, strides = self.struct(problem), problem.strides[0]
        size = (problem.batch, problem.channels, problem.height, problem.width)

        def grad_input(grad_output: Tensor, weight: Tensor) -> Tensor:
            gradient = torch.empty_strided(size, strides, dtype=torch.float32, device=_CPU)
            _compute(struct, gradient, weight, None, None, grad_output)
            return gradient

        return grad_input

    def grad_weight_of(self, problem: Problem) -> Gradient:
        """``grad_weight`` of ``problem`` for tensors to come, as ``forward_of``."""
        struct, size = self.struct(problem), (problem.channels, 1, *problem.kernel_size)

        def grad_weight(grad_output: Tensor, input: Tensor) -> Tensor:
            gradient = torch.empty(size, dtype=torch.float32, device=_CPU)
            _compute(struct, input, gradient, None, None, grad_output)
            return gradient

        return grad_weight

    def struct(self, problem: Problem) -> _binary.ProblemStruct:
        """The problem for tensors in its layout; not to be changed."""
        return _struct(problem, self._code, torch.get_num_threads())

    def spectrum_bytes(self, problem: Problem) -> int:
        """Size of the spectra that ``prepare`` makes; 0 if it makes none."""
        return library().rk_spectrum_bytes(self.prepared_struct(problem, relu=False))

    def prepare(self, problem: Problem, packed: Tensor) -> PreparedFilters:
        """Packed filters for ``forward_prepared_of``, valid as long as they do not change."""
        struct = self.prepared_struct(problem, relu=False)
        packed = _float32(packed)
        size = self.spectrum_bytes(problem)
        if not size:
            return PreparedFilters(packed, None, isa())
        spectra = torch.empty(size // 4, dtype=torch.float32, device=_CPU)  # aligned to 64 bytes
        check(library().rk_prepare(struct, packed.data_ptr(), spectra.data_ptr()))
        return PreparedFilters(packed, spectra, isa())

    def forward_prepared_of(
        self, problem: Problem, filters: PreparedFilters, relu: bool
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """``forward`` with filters from ``prepare``, for an input and a bias to come.

        The input is float32 and has the strides of the problem.

        Raises:
            ValueError: the instruction set changed since the filters were prepared.
        """
        if filters.isa != isa():
            raise ValueError(
                f"the filters were prepared for {filters.isa}, but {isa()} is in use; prepare anew"
            )
        compute = _forward(problem, self._code, torch.get_num_threads(), relu, packed=True)
        packed, spectra = filters.packed, filters.spectra

        def forward(input: Tensor, bias: Tensor | None) -> Tensor:
            return compute(input, packed, None if bias is None else _float32(bias), spectra)

        return forward

    def prepared_struct(self, problem: Problem, relu: bool) -> _binary.ProblemStruct:
        """The problem of ``forward_prepared_of``."""
        return _struct(problem, self._code, torch.get_num_threads(), relu, packed=True)

    def grad_input(self, problem: Problem, grad_output: Tensor, weight: Tensor) -> Tensor:
        size = (problem.batch, problem.channels, problem.height, problem.width)
        gradient = torch.empty_strided(size, problem.strides[0], dtype=problem.dtype, device=_CPU)
        struct = _with_strides(self.struct(problem), problem, gradient, grad_output)
        _compute(struct, gradient, _float32(weight), None, None, grad_output)
        return gradient

    def grad_weight(self, problem: Problem, grad_output: Tensor, input: Tensor) -> Tensor:
        size = (problem.channels, 1, *problem.kernel_size)
        gradient = torch.empty(size, dtype=torch.float32, device=_CPU)
        struct = _with_strides(self.struct(problem), problem, input, grad_output)
        _compute(struct, input, gradient, None, None, grad_output)
        return gradient if problem.dtype == torch.float32 else gradient.to(problem.dtype)


def _with_strides(
    struct: _binary.ProblemStruct, problem: Problem, input: Tensor, output: Tensor
) -> _binary.ProblemStruct:
    """``struct`` for tensors that may not have the strides of ``problem``."""
    strides = input.stride(), output.stride()
    if strides != problem.strides:
        struct = _binary.ProblemStruct.from_buffer_copy(struct)
        struct.input_stride[:], struct.output_stride[:] = strides
    return struct


def _compute(
    struct: _binary.ProblemStruct,
    input: Tensor,
    weight: Tensor,
    spectrum: Tensor | None,
    bias: Tensor | None,
    output: Tensor,
) -> None:
    status = library().rk_run(
        struct,
        input.data_ptr(),
        weight.data_ptr(),
        None if spectrum is None else spectrum.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
    )
    if status:
        check(status)


@lru_cache(maxsize=4096)
def _forward(
    problem: Problem, algorithm: int, threads: int, relu: bool, packed: bool = False
) -> Callable[..., Tensor]:
    """The output of input, weight, bias and spectra; what does not depend on them is at hand."""
    struct, run = _struct(problem, algorithm, threads, relu, packed), library().rk_run
    shape, dtype = problem.output_shape, problem.dtype
    input_strides, strides = problem.strides
    keeps_size = problem.output_size == (problem.height, problem.width)
    like_input = keeps_size and strides == input_strides
    empty_like, empty = torch.empty_like, torch.empty_strided

    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, spectra: Tensor | None = None
    ) -> Tensor:
        if like_input:
            output = empty_like(input)
        else:
            output = empty(shape, strides, dtype=dtype, device=_CPU)
        status = run(
            struct,
            input.data_ptr(),
            weight.data_ptr(),
            None if spectra is None else spectra.data_ptr(),
            None if bias is None else bias.data_ptr(),
            output.data_ptr(),
        )
        if status:
            check(status)
        return output

    return forward


@lru_cache(maxsize=4096)
def _struct(
    problem: Problem, algorithm: int, threads: int, relu: bool = False, packed: bool = False
) -> _binary.ProblemStruct:
    """The problem for the native core, with tensors in the problem's layout; not to be changed."""
    output_h, output_w = problem.output_size
    input_stride, output_stride = problem.strides
    return _binary.ProblemStruct(
        batch=problem.batch,
        channels=problem.channels,
        in_h=problem.height,
        in_w=problem.width,
        out_h=output_h,
        out_w=output_w,
        input_stride=input_stride,
        output_stride=output_stride,
        kernel_h=problem.kernel_size[0],
        kernel_w=problem.kernel_size[1],
        stride_h=problem.stride[0],
        stride_w=problem.stride[1],
        dilation_h=problem.dilation[0],
        dilation_w=problem.dilation[1],
        pad_top=problem.padding[0],
        pad_left=problem.padding[2],
        pass_=_PASSES[problem.pass_],
        algorithm=algorithm,
        dtype=_DTYPES[problem.dtype],
        relu=relu,
        packed_weight=packed,
        threads=threads,
    )


def why_missing() -> str:
    """Why there is no native core; empty when there is one."""
    return _binary.reason_missing


def isas() -> tuple[str, ...]:
    """Instruction sets that are compiled in and that this machine executes, best first."""
    return tuple(library().rk_available_isas().decode().split(","))


@lru_cache(maxsize=1)
def isa() -> str:
    """The instruction set in use: the best, else what ``REPLKNET_ISA`` or ``force_isa`` says."""
    return library().rk_isa().decode()


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Use one instruction set in a ``with`` block, in the whole process.

    Raises:
        ValueError: it is not among ``isas()``.
    """
    before = isa()
    if library().rk_force_isa(name.encode()):
        raise ValueError(f"instruction set must be one of {', '.join(isas())}; got {name!r}")
    isa.cache_clear()
    try:
        yield
    finally:
        library().rk_force_isa(before.encode())
        isa.cache_clear()


def fma_peak(threads: int) -> float:
    """Float32 operations a second that ``threads`` threads reach in registers, measured now."""
    return library().rk_fma_peak(threads)


def library() -> ctypes.CDLL:
    """The native core; raises ``NotImplementedError`` where there is none."""
    if _binary.library is None:
        raise NotImplementedError(f"this needs the native core: {_binary.reason_missing}")
    return _binary.library


def check(status: int) -> None:
    if status == _binary.OUT_OF_MEMORY:
        raise MemoryError("the native core could not allocate its workspace")
    if status:
        raise NotImplementedError("the native core does not support this problem")


def _empty_output(problem: Problem) -> Tensor:
    size, strides = problem.output_shape, problem.strides[1]
    return torch.empty_strided(size, strides, dtype=problem.dtype, device=_CPU)


def _float32(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        tensor = tensor.detach().to(torch.float32)
    return tensor.contiguous()

"""The one module that touches the native core: loads the library and declares its C interface."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

FORWARD, GRAD_INPUT, GRAD_WEIGHT = 0, 1, 2
DIRECT, FFT = 0, 1
F32, BF16, F16 = 0, 1, 2
OUT_OF_MEMORY = 2
IDENTITY, RELU, GELU = 0, 1, 2
PANEL, COLUMNS = 16, 32
FILTER_LANES = 16
KINDS = 4


class ProblemStruct(ctypes.Structure):
    """``rk_problem`` of csrc/replknet_core.h."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("in_h", ctypes.c_int64),
        ("in_w", ctypes.c_int64),
        ("out_h", ctypes.c_int64),
        ("out_w", ctypes.c_int64),
        ("input_stride", ctypes.c_int64 * 4),
        ("output_stride", ctypes.c_int64 * 4),
        ("kernel_h", ctypes.c_int32),
        ("kernel_w", ctypes.c_int32),
        ("stride_h", ctypes.c_int32),
        ("stride_w", ctypes.c_int32),
        ("dilation_h", ctypes.c_int32),
        ("dilation_w", ctypes.c_int32),
        ("pad_top", ctypes.c_int32),
        ("pad_left", ctypes.c_int32),
        ("pass_", ctypes.c_int32),
        ("algorithm", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("relu", ctypes.c_int32),
        ("packed_weight", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class LayerStruct(ctypes.Structure):
    """``rk_layer`` of csrc/replknet_core.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_channels", ctypes.c_int64),
        ("out_channels", ctypes.c_int64),
        ("activation", ctypes.c_int32),
        ("input_sizes", ctypes.c_void_p),
        ("output_sizes", ctypes.c_void_p),
        ("pair_sums", ctypes.c_void_p),
    ]


class BlockStruct(ctypes.Structure):
    """``rk_block`` of csrc/replknet_core.h."""

    _fields_ = [
        ("first", LayerStruct),
        ("second", LayerStruct),
        ("large_kernel", ctypes.POINTER(ProblemStruct)),
        ("filters", ctypes.c_void_p),
        ("spectra", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class MatrixStruct(ctypes.Structure):
    """``rk_matrix`` of csrc/replknet_core.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("transposed", ctypes.c_int32),
    ]


class NormStruct(ctypes.Structure):
    """``rk_norm`` of csrc/replknet_core.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("variance", ctypes.c_void_p),
        ("running_mean", ctypes.c_void_p),
        ("running_variance", ctypes.c_void_p),
        ("batches", ctypes.c_void_p),
        ("grad_weight", ctypes.c_void_p),
        ("grad_bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("momentum", ctypes.c_float),
    ]


class DepthwiseStruct(ctypes.Structure):
    """``rk_depthwise`` of csrc/replknet_core.h."""

    _fields_ = [
        ("forward", ctypes.POINTER(ProblemStruct)),
        ("grad_input", ctypes.POINTER(ProblemStruct)),
        ("grad_weight", ctypes.POINTER(ProblemStruct)),
        ("weight", ctypes.c_void_p),
        ("weight_gradient", ctypes.c_void_p),
    ]


class BranchStruct(ctypes.Structure):
    """``rk_branch`` of csrc/replknet_core.h."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("images", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("activation", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("grad_first", ctypes.c_void_p),
        ("grad_second", ctypes.c_void_p),
        ("large", ctypes.POINTER(DepthwiseStruct)),
        ("small", ctypes.POINTER(DepthwiseStruct)),
        ("norms", NormStruct * 5),
        ("image_scales", ctypes.c_void_p),
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("maps", ctypes.c_void_p),
        ("seconds", ctypes.POINTER(ctypes.c_double)),
    ]


def _load() -> tuple[ctypes.CDLL | None, str]:
    path = Path(__file__).with_name("libreplknet_core.so")
    if not path.exists():
        return None, (
            f"{path.name} was not built: reinstall replknet where a C++ compiler is on the PATH"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    problem = ctypes.POINTER(ProblemStruct)
    layer, sizes = ctypes.POINTER(LayerStruct), [ctypes.c_int64] * 2
    norm, matrix = ctypes.POINTER(NormStruct), ctypes.POINTER(MatrixStruct)
    branch = ctypes.POINTER(BranchStruct)
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("rk_supports", ctypes.c_int, [problem]),
        ("rk_workspace_bytes", ctypes.c_size_t, [problem]),
        ("rk_spectrum_bytes", ctypes.c_size_t, [problem]),
        ("rk_prepare", ctypes.c_int, [problem, pointer, pointer]),
        ("rk_run", ctypes.c_int, [problem, *[pointer] * 5]),
        ("rk_pair_sum_bytes", ctypes.c_size_t, [layer]),
        ("rk_sum_pairs", ctypes.c_int, [layer, pointer]),
        ("rk_pointwise", ctypes.c_int, [layer, *sizes, *[pointer] * 3, ctypes.c_int]),
        (
            "rk_pointwise_pair",
            ctypes.c_int,
            [layer, layer, *sizes, *[pointer] * 3, ctypes.c_int],
        ),
        (
            "rk_blocks",
            ctypes.c_int,
            [
                ctypes.POINTER(BlockStruct),
                ctypes.c_int64,
                *sizes,
                *[pointer] * 2,
                ctypes.c_int,
                ctypes.POINTER(ctypes.c_double),
            ],
        ),
        (
            "rk_matmul",
            ctypes.c_int,
            [matrix, matrix, *sizes, ctypes.c_int64, pointer, ctypes.c_int],
        ),
        (
            "rk_norm_forward",
            ctypes.c_int,
            [norm, *sizes, ctypes.c_int, *[pointer] * 2, ctypes.c_int],
        ),
        (
            "rk_norm_backward",
            ctypes.c_int,
            [norm, *sizes, ctypes.c_int, *[pointer] * 3, ctypes.c_int],
        ),
        ("rk_branch_map_floats", ctypes.c_int64, [branch]),
        ("rk_branches_forward", ctypes.c_int, [branch, ctypes.c_int64]),
        ("rk_branches_backward", ctypes.c_int, [branch, ctypes.c_int64, *[pointer] * 2]),
        ("rk_available_isas", text, []),
        ("rk_isa", text, []),
        ("rk_force_isa", ctypes.c_int, [text]),
        ("rk_fma_peak", ctypes.c_double, [ctypes.c_int]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    forced = os.environ.get("REPLKNET_ISA", "")
    if library.rk_force_isa(forced.encode()):
        available = library.rk_available_isas().decode()
        raise ValueError(f"REPLKNET_ISA={forced!r} is not available here; use one of {available}")
    return library, ""


library, reason_missing = _load()

"""Products of float32 matrices for the 1x1 convolutions of a training step on a CPU, where they are
faster than a library's.

With AMX each number is split into three of bfloat16, so the results are as exact as those of
float32 products; see csrc/bf16_parts.h. AMD's processors with AVX-512 add beside their
multiply-adds: one multiplies the sums of two pairs and makes two products; see
csrc/channel_pairs.h. Rows of the left matrix and columns of the right one are scaled for that, and
errors are up to three times those of a library, or more where the left matrix's columns are large
by as much as the right one's rows are small (3e-5 of the largest element if both span e^-3 to e^3).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from replknet.ops import _binary
from replknet.ops.eager import is_ordinary, nothing_listens
from replknet.ops.native import check

# Measured: below, copying the matrices costs as much as the product saves.
_FEWEST_MULTIPLY_ADDS, _SMALLEST_SIDE = 2**24, 128
_INSTRUCTION_SETS = (b"amx", b"zen4")


def suits_native(*matrices: Tensor) -> bool:
    """Whether ``matmul`` can multiply such tensors."""
    return (
        not torch.compiler.is_compiling()
        and _binary.library is not None
        and _binary.library.rk_isa() in _INSTRUCTION_SETS
        and all(is_ordinary(m) and m.is_cpu and m.dtype == torch.float32 for m in matrices)
    )


def native_pays(rows: int, columns: int, depth: int) -> bool:
    """Whether a product of these sizes is faster than a library's."""
    enough = rows * columns * depth >= _FEWEST_MULTIPLY_ADDS
    return enough and min(rows, columns, depth) >= _SMALLEST_SIDE


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` for matrices that ``suits_native``, each contiguous or the transpose of one.

    It has no derivative. Whoever watches PyTorch's operators sees ``replknet::matmul``.

    Raises:
        ValueError: the sizes do not fit, or a matrix has other strides.
    """
    product: Tensor = (run if nothing_listens() else operator)(left, right)
    return product


def run(left: Tensor, right: Tensor) -> Tensor:
    """What ``matmul`` returns."""
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(
            "left must be (rows, depth) and right (depth, columns), "
            f"got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    (rows, depth), columns = left.shape, right.shape[1]
    product = left.new_empty(rows, columns)
    if not product.numel() or not depth:
        return product.zero_()
    library = _binary.library
    assert library is not None
    check(
        library.rk_matmul(
            _struct("left", left),
            _struct("right", right),
            rows,
            columns,
            depth,
            product.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return product


operator: Any = torch.library.custom_op("replknet::matmul", run, mutates_args=())


@operator.register_fake
def _(left, right):
    return left.new_empty(left.shape[0], right.shape[1])


@register_flop_formula(torch.ops.replknet.matmul)
def _(left, right, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(left) * right[1]


def _struct(name: str, matrix: Tensor) -> _binary.MatrixStruct:
    if matrix.is_contiguous():
        return _binary.MatrixStruct(matrix.data_ptr(), matrix.shape[1], False)
    if matrix.T.is_contiguous():
        return _binary.MatrixStruct(matrix.data_ptr(), matrix.shape[0], True)
    raise ValueError(
        f"{name} must be contiguous, or its transpose, got strides {matrix.stride()}; "
        "call contiguous() first"
    )

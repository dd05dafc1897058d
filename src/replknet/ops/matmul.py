"""Products of float32 matrices for the 1x1 convolutions of a training step on a CPU.

By multiply-adds they take about as long as a library's, and can be parts of larger native calls.
With AMX each number is split into three of bfloat16, so the results are as exact as those of
float32 products; see csrc/bf16_parts.h. AMD's processors with AVX-512 add beside their
multiply-adds: one multiplies the sums of two pairs and makes two products; see
csrc/channel_pairs.h. Rows of the left matrix and columns of the right one are scaled for that, and
errors are up to three times those of a library, or more where the left matrix's columns are large
by as much as the right one's rows are small (3e-5 of the largest element if both span e^-3 to e^3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from replknet.ops import _binary
from replknet.ops.eager import is_ordinary
from replknet.ops.native import check

# Measured: below, copying the matrices costs as much as the product saves.
_FEWEST_MULTIPLY_ADDS, _SMALLEST_SIDE = 2**24, 128
# A library's products are faster than those of the portable core on x86; elsewhere: not measured.
_LEFT_TO_LIBRARIES = b"baseline"


class Matrix(NamedTuple):
    """Float32 numbers in memory, row after row; those of its transpose if it is ``transposed``."""

    address: int
    rows: int
    columns: int
    transposed: bool = False

    @property
    def T(self) -> Matrix:
        return Matrix(self.address, self.columns, self.rows, not self.transposed)

    def struct(self) -> _binary.MatrixStruct:
        stride = self.rows if self.transposed else self.columns
        return _binary.MatrixStruct(self.address, stride, self.transposed)


def suits_native(*tensors: Tensor) -> bool:
    """Whether the native core is to multiply numbers that such tensors hold."""
    return (
        not torch.compiler.is_compiling()
        and _binary.library is not None
        and _binary.library.rk_isa() != _LEFT_TO_LIBRARIES
        and all(is_ordinary(t) and t.is_cpu and t.dtype == torch.float32 for t in tensors)
    )


def native_pays(rows: int, columns: int, depth: int) -> bool:
    """Whether a product of these sizes is about as fast as a library's, or faster."""
    enough = rows * columns * depth >= _FEWEST_MULTIPLY_ADDS
    return enough and min(rows, columns, depth) >= _SMALLEST_SIDE


def multiply(left: Matrix, right: Matrix, product: Tensor) -> None:
    """Write ``left @ right``, row after row, to the memory of a tensor.

    None of the three is empty.

    Raises:
        ValueError: the sizes do not fit.
    """
    sizes = left.rows, right.columns, left.columns
    if left.columns != right.rows or product.numel() != left.rows * right.columns:
        raise ValueError(
            f"{left.rows} x {left.columns} numbers times {right.rows} x {right.columns} "
            f"do not make {product.numel()}"
        )
    assert _binary.library is not None
    check(
        _binary.library.rk_matmul(
            left.struct(), right.struct(), *sizes, product.data_ptr(), torch.get_num_threads()
        )
    )

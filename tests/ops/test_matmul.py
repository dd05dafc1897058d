"""Products of matrices against sums in float64."""

import pytest
import torch

from replknet.ops import _binary, native
from replknet.ops.matmul import Matrix, multiply, suits_native

# rows, depth, columns: one of each, borders of tiles, turns of rows, several chunks of the depth
SIZES = [(1, 1, 1), (3, 5, 7), (17, 33, 31), (49, 512, 100), (100, 1030, 77), (900, 64, 33)]


@pytest.fixture(params=native.isas() if _binary.library else ())
def isa(request):
    with native.force_isa(request.param):
        yield request.param


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def matmul(left, right):
    product = torch.empty(len(left), right.shape[1])
    multiply(matrix(left), matrix(right), product)
    return product


def matrix(tensor):
    """A tensor that is contiguous, or the transpose of one."""
    if tensor.is_contiguous():
        return Matrix(tensor.data_ptr(), *tensor.shape)
    assert tensor.T.is_contiguous()
    return matrix(tensor.T).T


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("transposed", ["none", "left", "right", "both"])
@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
def test_products(isa, rows, depth, columns, transposed, threads):
    left, right = randn(rows, depth, seed=1), randn(depth, columns, seed=2)
    exact = left.double() @ right.double()
    if transposed in ("left", "both"):
        left = left.T.contiguous().T
    if transposed in ("right", "both"):
        right = right.T.contiguous().T
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        product = matmul(left, right)
    finally:
        torch.set_num_threads(before)
    bound = 2e-6 if isa == "zen4" else 1e-6
    assert (product - exact).abs().max() <= bound * exact.abs().max()
    assert torch.equal(product, matmul(left, right))


def test_a_number_that_is_not_finite_stays_in_its_row(isa):
    left = torch.ones(40, 64)
    left[7, 3] = torch.inf
    product = matmul(left, torch.ones(64, 33))
    assert not product[7].isfinite().any()
    assert isa != "amx" or product[7].isnan().all()
    assert isa in ("amx", "zen4") or product[7].isposinf().all()
    assert (product[torch.arange(40) != 7] == 64).all()


def test_refuses_what_does_not_fit():
    left, right = Matrix(0, 2, 3), Matrix(0, 4, 5)
    with pytest.raises(ValueError, match="2 x 3 numbers times 4 x 5 do not make 10"):
        multiply(left, right, torch.empty(2, 5))
    with pytest.raises(ValueError, match="2 x 3 numbers times 3 x 2 do not make 10"):
        multiply(left, left.T, torch.empty(2, 5))


def test_suits_native():
    matrix = torch.ones(2, 2)
    assert suits_native(matrix) == (_binary.library is not None and native.isa() != "baseline")
    assert not suits_native(matrix, matrix.double())
    assert not suits_native(torch.ones(2, device="meta"))


@pytest.mark.skipif(_binary.library is None, reason="there is no native core")
def test_the_portable_core_leaves_products_to_libraries():
    with native.force_isa("baseline"):
        assert not suits_native(torch.ones(2, 2))

"""Products of matrices, where an instruction set has them, against sums in float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from replknet.nn import PointwiseConv2d
from replknet.ops import _binary, native
from replknet.ops.matmul import matmul, native_pays, operator, suits_native

ISAS = [isa for isa in (native.isas() if _binary.library else ()) if isa in ("amx", "zen4")]
# rows, depth, columns: one of each, borders of tiles, turns of rows, several chunks of the depth
SIZES = [(1, 1, 1), (3, 5, 7), (17, 33, 31), (49, 512, 100), (100, 1030, 77), (900, 64, 33)]


@pytest.fixture(params=ISAS)
def isa(request):
    """An instruction set with products, in use."""
    with native.force_isa(request.param):
        yield request.param


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


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
    assert (product - exact).abs().max() <= (2e-6 if isa == "zen4" else 1e-6) * exact.abs().max()
    assert torch.equal(product, matmul(left, right))


def test_a_number_that_is_not_finite_stays_in_its_row(isa):
    left = torch.ones(40, 64)
    left[7, 3] = torch.inf
    product = matmul(left, torch.ones(64, 33))
    assert not product[7].isfinite().any()
    assert isa == "zen4" or product[7].isnan().all()
    assert (product[torch.arange(40) != 7] == 64).all()


def test_empty_matrices(isa):
    assert matmul(torch.ones(0, 3), torch.ones(3, 4)).shape == (0, 4)
    assert torch.equal(matmul(torch.ones(2, 0), torch.ones(0, 4)), torch.zeros(2, 4))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(4, 5\)"):
        matmul(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"got \(2, 3, 1\) and \(3, 5\)"):
        matmul(torch.ones(2, 3, 1), torch.ones(3, 5))


def test_refuses_other_strides(isa):
    with pytest.raises(ValueError, match=r"right must be contiguous.*\(10, 2\); call contiguous"):
        matmul(torch.ones(2, 3), torch.ones(3, 10)[:, ::2])


def test_is_an_operator(isa):
    left, right = randn(300, 128), randn(256, 128).T
    torch.library.opcheck(operator, (left, right), test_utils=("test_schema", "test_faketensor"))
    with FlopCounterMode(display=False) as counter:
        seen = matmul(left, right)
    assert counter.get_total_flops() == 2 * 300 * 128 * 256
    assert torch.equal(seen, matmul(left, right))


def test_a_training_step_that_is_watched_is_the_same(isa):
    """Each of its products is an operator, of as many operations as those of a convolution."""
    layer, x = PointwiseConv2d(256, 256), randn(1, 256, 16, 16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    layer(x).sum().backward()
    plain = layer.weight.grad, x.grad
    layer.weight.grad = x.grad = None
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.flop_counts["Global"] == {torch.ops.replknet.matmul: 3 * 2 * 256**3}
    assert torch.equal(layer.weight.grad, plain[0])
    assert torch.equal(x.grad, plain[1])


def test_suits_native():
    matrix = torch.ones(2, 2)
    assert suits_native(matrix) == (bool(ISAS) and native.isa() in ISAS)
    assert not suits_native(matrix, matrix.double())
    assert not suits_native(torch.ones(2, device="meta"))


@pytest.mark.skipif(_binary.library is None, reason="there is no native core")
def test_other_instruction_sets_have_none():
    with native.force_isa("baseline"):
        assert not suits_native(torch.ones(2, 2))
        with pytest.raises(NotImplementedError):
            matmul(torch.ones(2, 3), torch.ones(3, 4))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 512), (512, 128), (256, 256)])
def test_trains_as_a_convolution(inputs, outputs, bias):
    """Sizes that are computed natively where there is a product."""
    torch.manual_seed(0)
    assert native_pays(2 * 16 * 16, outputs, inputs)
    layer = PointwiseConv2d(inputs, outputs, bias=bias)
    exact = torch.nn.Conv2d(inputs, outputs, 1, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    x = randn(2, inputs, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    y = x.detach().double().requires_grad_()
    output, expected = layer(x), exact(y)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert (output - expected).abs().max() <= 1e-6 * expected.abs().max()
    gradient = randn(*output.shape, seed=3)  # NCHW, as some layers give
    output.backward(gradient)
    expected.backward(gradient.double())
    for mine, other in zip((x, *layer.parameters()), (y, *exact.parameters()), strict=True):
        assert mine.grad.is_contiguous() or mine is x
        assert (mine.grad - other.grad).abs().max() <= 2e-6 * other.grad.abs().max()

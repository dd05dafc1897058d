"""1x1 convolutions of a training step: by products of our own where there are some."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from replknet.nn import PointwiseConv2d
from replknet.ops import conv1x1, native
from replknet.ops.matmul import native_pays


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def maps(*size, seed=0):
    return randn(*size, seed=seed).to(memory_format=torch.channels_last)


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


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_operators(product_isa, format):
    input, grad = (randn(2, c, 5, 7).to(memory_format=format) for c in (20, 40))
    weight, bias = randn(40, 20, 1, 1, seed=1), randn(40, seed=2)
    for operator, arguments in (
        (conv1x1.forward_operator, (input, weight, bias)),
        (conv1x1.forward_operator, (input, weight, None)),
        (conv1x1.grad_input_operator, (grad, weight)),
        (conv1x1.grad_weight_operator, (grad, input)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_training_step_that_is_watched_is_the_same(product_isa):
    """Each of its products is an operator, of as many operations as those of a convolution."""
    layer, x = PointwiseConv2d(256, 512), maps(2, 256, 16, 16).requires_grad_()
    layer(x).square().sum().backward()
    plain = layer.weight.grad, x.grad
    layer.weight.grad = x.grad = None
    with FlopCounterMode(display=False) as counter:
        layer(x).square().sum().backward()
    ops, count = torch.ops.replknet, 2 * 256 * 512 * 2 * 16 * 16
    seen = {ops.conv1x1: count, ops.conv1x1_grad_input: count, ops.conv1x1_grad_weight: count}
    assert counter.flop_counts["Global"] == seen
    assert torch.equal(layer.weight.grad, plain[0])
    assert torch.equal(x.grad, plain[1])


def test_the_instruction_set_may_change_before_the_backward_pass(product_isa):
    layer, x = PointwiseConv2d(256, 256), maps(1, 256, 16, 16)
    exact = torch.nn.Conv2d(256, 256, 1).double()
    exact.load_state_dict(layer.state_dict())
    output = layer(x)
    with native.force_isa("baseline"):
        output.sum().backward()
    exact(x.double()).sum().backward()
    torch.testing.assert_close(layer.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-3)


def test_has_derivatives_of_second_order(product_isa):
    torch.manual_seed(0)
    layer, x = PointwiseConv2d(256, 256, bias=False), maps(1, 256, 16, 16).requires_grad_()
    exact = torch.nn.Conv2d(256, 256, 1, bias=False).double()
    exact.load_state_dict(layer.state_dict())
    y = x.detach().double().requires_grad_()
    seconds = []
    for network, input in ((layer, x), (exact, y)):
        loss = network(input).square().sum()
        (first,) = torch.autograd.grad(loss, network.weight, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), (input, network.weight)))
    for mine, expected in zip(*seconds, strict=True):
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_refuses_other_channels_as_conv2d_does(product_isa):
    with pytest.raises(RuntimeError, match="to have 256 channels, but got 512 channels"):
        PointwiseConv2d(256, 256)(maps(1, 512, 16, 16))

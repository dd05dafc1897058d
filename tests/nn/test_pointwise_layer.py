"""PointwiseConv2d is nn.Conv2d in everything but speed."""

import copy

import pytest
import torch
from torch import nn

from replknet.nn import PointwiseConv2d, pointwise


@pytest.fixture(params=[True, False], ids=["mkl", "convolution"])
def mkl(request, monkeypatch):
    """The layer on either road, on any machine, however small."""
    monkeypatch.setattr(pointwise, "HAS_MKL", request.param)
    monkeypatch.setattr(pointwise, "_FEWEST_FOR_MKL", 0)
    return request.param


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
def test_trains_as_conv2d(mkl, bias, format):
    torch.manual_seed(0)
    ours = PointwiseConv2d(6, 10, bias=bias)
    reference = nn.Conv2d(6, 10, 1, bias=bias).double()
    reference.load_state_dict(ours.state_dict())
    assert ours.extra_repr() == reference.extra_repr()
    input = torch.randn(2, 6, 5, 7).to(memory_format=format).requires_grad_()
    twin = input.detach().double().requires_grad_()
    output, expected = ours(input), reference(twin)
    assert output.is_contiguous(memory_format=format)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(input.grad.double(), twin.grad, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert mine.grad.shape == mine.shape
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)


def test_takes_the_road_that_is_faster(mkl):
    input = torch.randn(2, 6, 5, 7)
    layer = PointwiseConv2d(6, 10)

    def product(x: torch.Tensor) -> bool:
        return "Convolution" not in str(next_names(layer(x)))

    assert product(input.to(memory_format=torch.channels_last)) == mkl
    assert not product(input)
    layer.requires_grad_(False)
    assert not product(input.to(memory_format=torch.channels_last).requires_grad_())


def test_small_layers_are_convolutions():
    output = PointwiseConv2d(6, 10)(torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last))
    assert "Convolution" in str(next_names(output))


def next_names(output: torch.Tensor) -> list[str]:
    """Names of the autograd nodes behind ``output``."""
    names, nodes = [], [output.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    return names


def test_without_gradients_is_the_convolution(mkl):
    layer = PointwiseConv2d(6, 10)
    reference = nn.Conv2d(6, 10, 1)
    reference.load_state_dict(layer.state_dict())
    for input in (torch.randn(1, 6, 4, 4), torch.randn(6, 4, 4)):
        with torch.inference_mode():
            assert torch.equal(layer(input), reference(input))
    half = copy.deepcopy(layer).bfloat16()(torch.zeros(1, 6, 4, 4, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert layer.to("meta")(torch.zeros(1, 6, 4, 4, device="meta")).is_meta


def channels_last(*size):
    return torch.randn(size).to(memory_format=torch.channels_last)


def test_has_derivatives_of_every_order(mkl):
    torch.manual_seed(0)
    layer, input = PointwiseConv2d(3, 4), channels_last(2, 3, 4, 5).requires_grad_()
    twin = copy.deepcopy(layer).double()
    other = input.detach().double().requires_grad_()
    results = []
    for network, x in ((layer, input), (twin, other)):
        (first,) = torch.autograd.grad(network(x).square().sum(), network.weight, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), (x, network.weight)))
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # PyTorch's own, in jvp
def test_under_transforms_and_the_compiler(mkl):
    torch.manual_seed(0)
    layer, input = PointwiseConv2d(3, 4, bias=False), channels_last(2, 3, 4, 5)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer(input).square().sum().backward()
    by_transform = torch.func.grad(loss)(parameters, input)["weight"]
    torch.testing.assert_close(by_transform, layer.weight.grad)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, input[:, None])
    torch.testing.assert_close(each["weight"].sum(0), layer.weight.grad)
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (input,), (input,))
    torch.testing.assert_close(tangent, 2 * loss(parameters, input))
    compiled = copy.deepcopy(layer)
    torch.compile(compiled, backend="aot_eager", fullgraph=True)(input).square().sum().backward()
    torch.testing.assert_close(compiled.weight.grad, layer.weight.grad)

"""The native batch norm of a training step, with the activation behind it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replknet.nn.norm import FusingSequential, norm_act
from replknet.ops import native
from replknet.ops.batch_norm import batch_norm, forward, suits_native

ACTIVATE = {"identity": lambda x: x, "relu": F.relu, "gelu": F.gelu}
SIZES = [(3, 1, 1, 2), (1, 7, 3, 5), (3, 8, 4, 4), (2, 19, 9, 11), (1, 33, 1, 40), (2, 64, 7, 7)]

each_isa = pytest.mark.parametrize("isa", native.isas())
each_activation = pytest.mark.parametrize("activation", ACTIVATE)


def tensors(size, mean=3.0, std=2.0):
    generator = torch.Generator().manual_seed(sum(size))
    x = torch.randn(size, generator=generator) * std + mean
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(2, size[1], generator=generator).unbind()
    grad = torch.randn(size, generator=generator)
    return x, weight.clone().requires_grad_(), bias.clone().requires_grad_(), grad


def expected(x, weight, bias, grad, activation, eps=1e-5):
    """Output, gradients, mean and variance in float64."""
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    output = ACTIVATE[activation](F.batch_norm(doubles[0], None, None, *doubles[1:], True, eps=eps))
    grads = torch.autograd.grad(output, doubles, grad.double())
    pixels = doubles[0].transpose(0, 1).flatten(1)
    return output, *grads, pixels.mean(1), pixels.var(1, correction=0)


def assert_near(results, values, tolerance=2e-6):
    for result, value in zip(results, values, strict=True):
        assert result.shape == value.shape
        scale = value.abs().max().clamp_min(1)
        assert (result.double() - value).abs().max() <= tolerance * scale


@each_isa
@each_activation
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(isa, activation, size):
    x, weight, bias, grad = tensors(size)
    with native.force_isa(isa):
        output, mean, variance = batch_norm(x, weight, bias, 1e-5, activation)
        grads = torch.autograd.grad(output, (x, weight, bias), grad)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not mean.requires_grad
    assert not variance.requires_grad
    values = expected(x, weight, bias, grad, activation)
    assert_near((output, *grads, mean, variance), values)


@each_isa
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(isa):
    x, weight, bias, _ = tensors((4, 16, 30, 30), mean=1e3, std=1.0)
    with native.force_isa(isa):
        _, _, variance = batch_norm(x, weight, bias, 1e-5)
    exact = x.detach().double().var((0, 2, 3), correction=0)
    assert ((variance.double() - exact).abs() / exact).max() < 1e-5


@each_isa
def test_the_slope_of_gelu(isa):
    z = (
        torch.linspace(-12, 12, 4001)
        .reshape(1, 1, -1, 1)
        .contiguous(memory_format=torch.channels_last)
    )
    doubles = z.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(doubles).sum(), doubles)
    mean, variance = z.mean(), z.var(correction=0)
    weight, bias = (variance + 1e-5).sqrt().reshape(1), mean.reshape(1)  # gives z back
    weight.requires_grad_()
    bias.requires_grad_()
    with native.force_isa(isa):
        output, _, _ = batch_norm(z, weight, bias, 1e-5, "gelu")
        (by_bias,) = torch.autograd.grad(output, bias, torch.ones_like(z), retain_graph=True)
        at = [0, 1000, 1900, 2000, 2100, 2400, 4000]
        ones = [F.one_hot(torch.tensor(i), 4001).float().reshape(1, 1, -1, 1) for i in at]
        slopes = [torch.autograd.grad(output, bias, one, retain_graph=True)[0] for one in ones]
    assert by_bias.item() == pytest.approx(slope.sum().item(), rel=1e-6)
    for i, value in zip(at, slopes, strict=True):
        assert value.item() == pytest.approx(
            slope.flatten()[i].item(), abs=1e-5
        )  # z itself is exact to 5e-6


@each_activation
def test_threads_share_the_rows(activation):
    x, weight, bias, grad = tensors((1, 24, 5, 7))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 50):  # more threads than rows at last
            torch.set_num_threads(threads)
            output, mean, variance = batch_norm(x, weight, bias, 1e-5, activation)
            grads = torch.autograd.grad(output, (x, weight, bias), grad)
            values = expected(x, weight, bias, grad, activation)
            assert_near((output, *grads, mean, variance), values)
    finally:
        torch.set_num_threads(before)


def test_nan_and_inf_reach_their_channel_only():
    x, weight, bias, _ = tensors((2, 9, 4, 4))
    with torch.no_grad():
        x[0, 3, 1, 1] = torch.nan
        x[1, 5, 0, 0] = torch.inf
    output, _, _ = batch_norm(x, weight, bias, 1e-5, "relu")
    broken = output.isnan().flatten(2).any(2).any(0)
    assert broken.nonzero().flatten().tolist() == [3, 5]


def test_the_operator_is_registered_whole():
    x, weight, bias, _ = tensors((2, 5, 3, 3))
    arguments = (x, weight, bias, 1e-5, "gelu")
    torch.library.opcheck(forward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_mode_sees_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            seen.append(function.name())
            return function(*arguments, **(kwargs or {}))

    seen = []
    x, weight, bias, grad = tensors((2, 5, 3, 3))
    with Names():
        output, _, _ = batch_norm(x, weight, bias, 1e-5, "relu")
        output.backward(grad)
    assert "replknet::batch_norm" in seen
    assert "replknet::batch_norm_backward" in seen
    assert_near((x.grad,), expected(x, weight, bias, grad, "relu")[1:2])


@each_activation
def test_second_derivatives(activation):
    x, weight, bias, grad = tensors((2, 3, 3, 3))
    results, doubles = [], [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    for dtype, inputs in ((torch.float32, (x, weight, bias)), (torch.float64, doubles)):
        if dtype == torch.float32:
            output = batch_norm(*inputs, 1e-5, activation)[0]
        else:
            output = ACTIVATE[activation](F.batch_norm(inputs[0], None, None, *inputs[1:], True))
        (first,) = torch.autograd.grad(output, inputs[0], grad.to(dtype), create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), inputs[:2]))
    assert_near(*results, tolerance=2e-5)


def test_what_the_native_kernel_leaves_to_pytorch():
    x, weight, bias, _ = tensors((2, 5, 3, 3))
    assert suits_native(x, weight, bias)
    assert suits_native(x, None, None)
    assert not suits_native(x.detach().contiguous(), weight, bias)  # NCHW
    assert not suits_native(x.double(), weight, bias)
    assert not suits_native(x[:1, :, :1, :1], weight, bias)  # no statistics: PyTorch says so
    assert not suits_native(x.to("meta"), weight, bias)
    with torch.autocast("cpu"):
        assert not suits_native(x, weight, bias)


class TestModules:
    """``norm_act`` beside the two modules it stands for."""

    @pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU()])
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("affine", [True, False])
    def test_same_output_gradients_and_statistics(self, activation, momentum, affine):
        ours = nn.BatchNorm2d(5, momentum=momentum, affine=affine)
        theirs = nn.BatchNorm2d(5, momentum=momentum, affine=affine)
        theirs.load_state_dict(ours.state_dict())
        for seed in range(2):
            x, _, _, grad = tensors((2, 5, 3, 3 + seed))
            y = x.detach().contiguous().requires_grad_()
            output, reference = norm_act(ours, activation, x), activation(theirs(y))
            output.backward(grad)
            reference.backward(grad)
            torch.testing.assert_close(output, reference, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
        for (name, value), other in zip(
            ours.state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6, msg=name)
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5)

    def test_evaluation_uses_the_running_statistics(self):
        norm = nn.BatchNorm2d(5).eval()
        x, _, _, _ = tensors((2, 5, 3, 3))
        assert torch.equal(norm_act(norm, nn.ReLU(), x), F.relu(norm(x)))

    def test_hooks_see_the_modules(self):
        unit = FusingSequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
        called = []
        unit[1].register_forward_hook(lambda *_: called.append("norm"))
        unit(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
        assert called == ["norm"]

    def test_one_map_less_is_kept(self):
        norm, x = nn.BatchNorm2d(64), tensors((4, 64, 16, 16))[0]
        kept = []

        def pack(tensor):
            if tensor.numel() == x.numel():
                kept.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            norm_act(norm, nn.GELU(), x)
        assert set(kept) == {x.data_ptr()}

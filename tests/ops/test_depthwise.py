"""Values and gradients of the operator against the definition, for every algorithm."""

import warnings

import pytest
import torch
from depthwise_oracle import oracle, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from replknet.ops import depthwise_conv2d, depthwise_conv2d_relu
from replknet.ops.algorithm import ALGORITHMS

CPU_ALGORITHMS = [name for name in ALGORITHMS if name != "triton"]
FORMATS = (torch.contiguous_format, torch.channels_last)
FORWARD_TOLERANCE, WEIGHT_TOLERANCE = 5e-7, 2e-6
# PyTorch's own convolution sums 961 taps one after the other.
TORCH_TOLERANCE = 5e-6


def run(algorithm, input, weight, bias, **kwargs):
    """Output, a random gradient of it, and the gradients of the three arguments."""
    arguments = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    output = depthwise_conv2d(*arguments, algorithm=algorithm, **kwargs)
    grad_output = torch.randn_like(output)
    return output, grad_output, torch.autograd.grad(output, arguments, grad_output)


sizes = st.one_of(st.integers(1, 16), st.integers(17, 70))
kernel_sizes = st.one_of(st.integers(1, 15), st.integers(16, 63))


@st.composite
def problems(draw):
    """Sizes, stride, padding and dilation of a valid call that is cheap enough for the oracle."""
    kernel_size = draw(kernel_sizes), draw(kernel_sizes)
    map_size = draw(sizes), draw(sizes)
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3), (2, 1)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 2), (3, 1)]))
    padding = []
    for k, d, size in zip(kernel_size, dilation, map_size, strict=True):
        reach = d * (k - 1) + 1
        low = draw(st.one_of(st.just(reach // 2), st.integers(0, reach + 2)))
        shortest = max(0, reach - size - low)
        high = draw(st.one_of(st.just(max(reach // 2, shortest)), st.just(shortest)))
        padding += [low, high]
    return kernel_size, map_size, stride, tuple(padding), dilation


@pytest.mark.parametrize("algorithm", ["auto", *CPU_ALGORITHMS])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    problem=problems(),
    batch=st.integers(0, 3),
    channels=st.sampled_from([1, 2, 7, 8, 17, 32]),
    format=st.sampled_from(FORMATS),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_definition(algorithm, problem, batch, channels, format, seed):
    kernel_size, map_size, stride, padding, dilation = problem
    if kernel_size[0] * kernel_size[1] * map_size[0] * map_size[1] * channels > 4e6:
        channels = 1
    torch.manual_seed(seed)
    input = torch.randn(batch, channels, *map_size).contiguous(memory_format=format)
    weight, bias = torch.randn(channels, 1, *kernel_size), torch.randn(channels)
    try:
        output, grad_output, gradients = run(
            algorithm, input, weight, bias, stride=stride, padding=padding, dilation=dilation
        )
    except NotImplementedError:
        assert algorithm not in ("auto", "torch", "torch_fft")
        return
    expected = oracle(input, weight, grad_output, stride, padding, dilation)
    expected_output = expected[0] + bias.double()[:, None, None]
    scale = TORCH_TOLERANCE / FORWARD_TOLERANCE if algorithm in ("auto", "torch") else 1
    assert relative_error(output, expected_output, weight) <= scale * FORWARD_TOLERANCE
    assert relative_error(gradients[0], expected[1], weight) <= scale * FORWARD_TOLERANCE
    if batch:
        by_channel = grad_output.transpose(0, 1)
        assert relative_error(gradients[1], expected[2], by_channel) <= scale * WEIGHT_TOLERANCE
        grad_bias = grad_output.double().sum((0, 2, 3))
        assert relative_error(gradients[2], grad_bias, by_channel) <= WEIGHT_TOLERANCE


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("size", "kernel_size"), [(56, 31), (28, 29), (14, 27), (7, 13)])
def test_accuracy_of_the_replknet_shapes(algorithm, format, size, kernel_size):
    torch.manual_seed(0)
    input = torch.randn(2, 8, size, size).contiguous(memory_format=format)
    weight = torch.randn(8, 1, kernel_size, kernel_size)
    output, grad_output, gradients = run(algorithm, input, weight, torch.zeros(8))
    half = kernel_size // 2
    expected = oracle(input, weight, grad_output, (1, 1), (half,) * 4, (1, 1))
    scale = TORCH_TOLERANCE / FORWARD_TOLERANCE if algorithm == "torch" else 1
    assert relative_error(output, expected[0]) <= scale * FORWARD_TOLERANCE
    assert relative_error(gradients[0], expected[1]) <= scale * FORWARD_TOLERANCE
    assert relative_error(gradients[1], expected[2]) <= scale * WEIGHT_TOLERANCE


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_other_dtypes(algorithm, dtype, tolerance):
    torch.manual_seed(0)
    input, weight = torch.randn(2, 8, 20, 18).to(dtype), torch.randn(8, 1, 13, 9).to(dtype)
    try:
        output, grad_output, gradients = run(
            algorithm, input, weight, torch.zeros(8, dtype=dtype), padding=(6, 4)
        )
    except NotImplementedError:
        assert dtype == torch.float64
        assert algorithm not in ("torch", "torch_fft")
        return
    assert {output.dtype, *(gradient.dtype for gradient in gradients)} == {dtype}
    expected = oracle(input, weight, grad_output, (1, 1), (6, 6, 4, 4), (1, 1))
    for result, reference in zip((output, *gradients[:2]), expected, strict=True):
        assert relative_error(result, reference) <= tolerance


def views(input):
    """The same values in memory laid out otherwise."""
    flat = torch.cat([torch.zeros(1), input.flatten()])
    yield "misaligned", flat[1:].view(input.shape)
    yield "sliced", torch.cat([input, input], 3)[..., : input.shape[3]]
    yield "every other", input.repeat_interleave(2, 1)[:, ::2]
    yield "transposed", input.transpose(2, 3).contiguous().transpose(2, 3)
    yield (
        "channels of a channels_last",
        (
            torch.cat([input, input], 1).contiguous(memory_format=torch.channels_last)[
                :, : input.shape[1]
            ]
        ),
    )


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_memory_of_the_arguments_does_not_matter(algorithm):
    torch.manual_seed(0)
    input, weight, bias = torch.randn(2, 6, 15, 13), torch.randn(6, 1, 7, 7), torch.randn(6)
    expected = depthwise_conv2d(input, weight, bias, algorithm=algorithm)
    for name, view in views(input):
        result = depthwise_conv2d(view, weight, bias, algorithm=algorithm)
        assert relative_error(result, expected.double()) < 1e-6, name
    for _, view in views(weight):
        result = depthwise_conv2d(input, view, bias, algorithm=algorithm)
        assert relative_error(result, expected.double()) < 1e-6
    expanded = input[:1].expand(2, -1, -1, -1)
    result = depthwise_conv2d(expanded, weight, bias, algorithm=algorithm)
    assert relative_error(result, expected[:1].double().expand(2, -1, -1, -1)) < 1e-6
    every_other = bias.repeat_interleave(2)[::2]
    result = depthwise_conv2d(input, weight, every_other, algorithm=algorithm)
    assert relative_error(result, expected.double()) < 1e-6


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_memory_of_what_gradients_are_made_of_does_not_matter(algorithm):
    torch.manual_seed(0)
    input, weight = torch.randn(2, 6, 15, 13), torch.randn(6, 1, 7, 7)
    grad_output = torch.randn(2, 6, 15, 13)

    def gradients(input, weight, grad_output):
        arguments = input.detach().requires_grad_(), weight.detach().requires_grad_()
        output = depthwise_conv2d(*arguments, algorithm=algorithm)
        return torch.autograd.grad(output, arguments, grad_output)

    def compare(case, results, expected):
        for result, reference in zip(results, expected, strict=True):
            assert relative_error(result, reference.double()) < 2e-6, case

    expected = gradients(input, weight, grad_output)
    for case, view in views(input):
        compare(f"input {case}", gradients(view, weight, grad_output), expected)
    for case, view in views(weight):
        compare(f"weight {case}", gradients(input, view, grad_output), expected)
    for case, view in views(grad_output):
        compare(f"gradient {case}", gradients(input, weight, view), expected)
    ones = torch.ones(())
    results = gradients(input, weight, ones.expand_as(input))
    compare("gradient expanded", results, gradients(input, weight, torch.ones_like(input)))


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
@pytest.mark.parametrize("format", FORMATS)
def test_keeps_the_memory_format(algorithm, format):
    input = torch.randn(2, 8, 12, 10).contiguous(memory_format=format).requires_grad_()
    output = depthwise_conv2d(input, torch.randn(8, 1, 7, 7), algorithm=algorithm)
    assert output.is_contiguous(memory_format=format)
    (grad,) = torch.autograd.grad(output.sum(), input)  # an expanded gradient has no format
    assert grad.is_contiguous(memory_format=format)


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_relu_is_folded_in(algorithm):
    torch.manual_seed(0)
    arguments = [
        torch.randn(size, requires_grad=True) for size in ((2, 8, 9, 9), (8, 1, 5, 5), (8,))
    ]
    fused = depthwise_conv2d_relu(*arguments, algorithm=algorithm)
    plain = depthwise_conv2d(*arguments, algorithm=algorithm).relu()
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)
    grad_output = torch.randn_like(plain)
    for got, expected in zip(
        torch.autograd.grad(fused, arguments, grad_output),
        torch.autograd.grad(plain, arguments, grad_output),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
@pytest.mark.parametrize(("batch", "height", "width"), [(0, 5, 5), (2, 1, 1), (1, 1, 30)])
def test_empty_and_tiny_maps(algorithm, batch, height, width):
    input = torch.randn(batch, 3, height, width)
    weight, bias = torch.randn(3, 1, 5, 7), torch.randn(3)
    output, _, gradients = run(algorithm, input, weight, bias, padding=(2, 3))
    expected = oracle(input, weight, torch.zeros_like(output), (1, 1), (2, 2, 3, 3), (1, 1))[0]
    assert output.shape == expected.shape == (batch, 3, height, width)
    assert relative_error(output, expected + bias.double()[:, None, None]) < 1e-6
    assert [g.shape for g in gradients] == [input.shape, weight.shape, bias.shape]


def test_no_pixels_with_padding_give_the_bias():
    output = depthwise_conv2d(
        torch.zeros(2, 3, 0, 0), torch.ones(3, 1, 3, 3), torch.arange(3.0), padding=2
    )
    assert output.shape == (2, 3, 2, 2)
    assert torch.equal(output[1, :, 0, 1], torch.arange(3.0))


@pytest.mark.parametrize("kernel_size", [(4, 4), (2, 5), (30, 31)])
def test_same_padding_of_an_even_kernel_follows_pytorch(kernel_size):
    input, weight = torch.randn(1, 2, 33, 35).double(), torch.randn(2, 1, *kernel_size).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch tells, once, that it pads a copy
        expected = torch.nn.functional.conv2d(input, weight, padding="same", groups=2)
    torch.testing.assert_close(depthwise_conv2d(input, weight), expected)


@pytest.mark.parametrize("algorithm", ["direct", "torch"])
def test_nan_stays_in_the_receptive_field(algorithm):
    if algorithm not in ALGORITHMS:
        pytest.skip("the native core is not built")
    input = torch.zeros(1, 8, 21, 21)
    input[0, 3, 10, 10] = float("nan")
    output = depthwise_conv2d(input, torch.ones(8, 1, 5, 5), algorithm=algorithm)
    bad = torch.zeros(1, 8, 21, 21, dtype=torch.bool)
    bad[0, 3, 8:13, 8:13] = True
    assert torch.equal(output.isnan(), bad)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name.endswith("fft")])
def test_nan_stays_in_its_channel_and_image(algorithm):
    torch.manual_seed(0)
    input = torch.randn(2, 24, 21, 21)
    clean = depthwise_conv2d(input, torch.ones(24, 1, 9, 9), algorithm=algorithm)
    input[0, 3, 10, 10] = float("inf")
    output = depthwise_conv2d(input, torch.ones(24, 1, 9, 9), algorithm=algorithm)
    assert not output[0, 3].isfinite().all()
    clean[0, 3] = output[0, 3]
    torch.testing.assert_close(output, clean, equal_nan=True)


@pytest.mark.parametrize("algorithm", ["torch", "torch_fft"])
@pytest.mark.parametrize("stride", [1, 2])
def test_first_and_second_derivatives(algorithm, stride):
    torch.manual_seed(0)
    arguments = [
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in ((2, 3, 5, 4), (3, 1, 3, 4), (3,))
    ]

    def call(input, weight, bias):
        return depthwise_conv2d(
            input, weight, bias, stride=stride, padding=(1, 2, 0, 3), algorithm=algorithm
        )

    def call_relu(input, weight, bias):
        return depthwise_conv2d_relu(
            input, weight, bias, stride=stride, padding=1, algorithm=algorithm
        )

    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)
    assert torch.autograd.gradcheck(call_relu, arguments)


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_second_derivatives_in_float32(algorithm):
    """The native algorithms have no float64: their double backward against PyTorch's."""
    torch.manual_seed(0)
    arguments = [torch.randn(s, requires_grad=True) for s in ((2, 8, 9, 9), (8, 1, 5, 5))]

    def second(name):
        output = depthwise_conv2d(*arguments, algorithm=name)
        first = torch.autograd.grad(output.square().sum(), arguments, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), arguments)

    for got, expected in zip(second(algorithm), second("torch"), strict=True):
        assert relative_error(got, expected.double()) < 1e-5

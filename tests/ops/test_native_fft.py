"""The native FFT algorithm for every instruction set: sizes, tiles, layouts, types, threads."""

import pytest
import torch
from depthwise_oracle import oracle, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from native_problems import each_isa, native_problem

from replknet.analysis.timing import use_threads
from replknet.ops import native
from replknet.ops.algorithm import ALGORITHMS
from replknet.ops.prepared import pack_filters

FFT = ALGORITHMS["fft"]
FORWARD_TOLERANCE, WEIGHT_TOLERANCE = 5e-7, 2e-6
# Points of the transforms in csrc/fft_plan.h.
SIZES = """
    16 20 24 25 28 30 32 35 36 40 42 45 48 49 50 54 56 60 63 64 70 72 80 81 84 90 96 100 108 112
    120 128 144 160 192 256
"""


def passes(input, weight, padding, dilation=(1, 1), bias=None, relu=False):
    """Output, a random gradient of it, and the gradients of input and weight."""
    problem = native_problem("forward", input, weight, padding, dilation=dilation)
    assert FFT.supports(problem).ok
    output = FFT.forward(problem, input, weight, bias, relu)
    grad_output = torch.randn(output.shape).to(input.dtype)
    grad_output = grad_output.contiguous(memory_format=_format(input))
    grad_input = FFT.grad_input(
        native_problem("grad_input", input, weight, padding, dilation=dilation), grad_output, weight
    )
    grad_weight = FFT.grad_weight(
        native_problem("grad_weight", input, weight, padding, dilation=dilation), grad_output, input
    )
    return output, grad_output, grad_input, grad_weight


def _format(input):
    last = input.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def check(input, weight, padding, dilation=(1, 1)):
    output, grad_output, grad_input, grad_weight = passes(input, weight, padding, dilation=dilation)
    expected = oracle(input, weight, grad_output, (1, 1), padding, dilation)
    assert relative_error(output, expected[0], weight) <= FORWARD_TOLERANCE
    assert relative_error(grad_input, expected[1], weight) <= FORWARD_TOLERANCE
    by_channel = grad_output.transpose(0, 1)
    assert relative_error(grad_weight, expected[2], by_channel) <= WEIGHT_TOLERANCE


def case(channels, size, kernel_size, batch=1, format=torch.channels_last):
    input = torch.randn(batch, channels, *size).contiguous(memory_format=format)
    weight = torch.randn(channels, 1, *kernel_size)
    same = tuple(side for k in kernel_size for side in ((k - 1) // 2, k // 2))
    return input, weight, same


@each_isa
@pytest.mark.parametrize("points", [int(size) for size in SIZES.split()])
def test_every_transform_size(isa, points):
    torch.manual_seed(points)
    with native.force_isa(isa):
        check(*case(3, (points - 1, 6), (3, 3)))
        check(*case(3, (6, points - 1), (3, 3), format=torch.contiguous_format))


@each_isa
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel_size=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    dilation=st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]),
    extra=st.tuples(*[st.integers(0, 3)] * 4),
    channels=st.sampled_from([1, 5, 16, 19, 33]),
    batch=st.integers(1, 3),
    format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_any_size_padding_and_dilation(
    isa, size, kernel_size, dilation, extra, channels, batch, format
):
    input, weight, _ = case(channels, size, kernel_size, batch, format)
    padding = []
    for axis in range(2):
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        low = max(0, reach // 2 + extra[2 * axis] - 1)
        padding += [low, max(extra[2 * axis + 1], reach - size[axis] - low)]
    with native.force_isa(isa):
        check(input, weight, tuple(padding), dilation)


@each_isa
@pytest.mark.parametrize("size", [(56, 56), (28, 28), (14, 14), (7, 7), (1, 1)])
@pytest.mark.parametrize("kernel_size", [(31, 31), (1, 31), (51, 5), (63, 63)])
def test_kernels_larger_than_the_map(isa, size, kernel_size):
    with native.force_isa(isa):
        check(*case(2, size, kernel_size))


@each_isa
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [20, 44])
@pytest.mark.parametrize(
    ("size", "kernel_size"), [((61, 58), (31, 29)), ((270, 50), (9, 11))], ids=["whole", "tiles"]
)
def test_groups_of_one_cache_line(isa, size, kernel_size, channels, batch, count):
    """On maps of which the planes of a few groups outgrow the cache."""
    with native.force_isa(isa), use_threads(count):
        check(*case(channels, size, kernel_size, batch))


@each_isa
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "kernel_size"),
    [((20, 301), (5, 21)), ((330, 17), (21, 3)), ((270, 259), (4, 7))],
)
def test_maps_of_several_tiles(isa, size, kernel_size, format):
    with native.force_isa(isa):
        check(*case(5, size, kernel_size, batch=2, format=format))


@each_isa
@pytest.mark.parametrize("channels", [44, 48])
def test_results_that_outgrow_the_caches_are_the_same(isa, channels):
    """Some processors write them past the caches, where no pixels share a line (48 channels)."""
    torch.manual_seed(0)
    input, weight, same = case(channels, (160, 170), (9, 9), batch=4)
    bias = torch.randn(channels)
    assert input.nbytes > 2**24

    def both(images):
        problem = native_problem("forward", images, weight, same)
        output = FFT.forward(problem, images, weight, bias, True)
        problem = native_problem("grad_input", images, weight, same)
        return output, FFT.grad_input(problem, images, weight)

    with native.force_isa(isa):
        halves = [both(images) for images in input.chunk(2)]
        for result, parts in zip(both(input), zip(*halves, strict=True), strict=True):
            assert torch.equal(result, torch.cat(parts))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(("channels", "batch"), [(1, 1), (3, 5), (40, 1), (100, 3)])
def test_any_number_of_threads_shares_the_work(count, channels, batch):
    with use_threads(count):
        check(*case(channels, (9, 12), (7, 7), batch))


@pytest.mark.parametrize("count", [1, 3])
def test_two_runs_give_the_same_bits(count):
    input, weight, padding = case(40, (30, 33), (13, 13), batch=4)
    with use_threads(count):
        torch.manual_seed(0)
        first = passes(input, weight, padding)
        torch.manual_seed(0)
        second = passes(input, weight, padding)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_isa
@pytest.mark.parametrize("batch", [1, 3])
def test_prepared_filters(isa, batch):
    input, weight, padding = case(21, (24, 17), (11, 9), batch)
    bias = torch.randn(21)
    problem = native_problem("forward", input, weight, padding)
    with native.force_isa(isa):
        prepared = FFT.prepare(problem, pack_filters(weight))
        output = FFT.forward_prepared_of(problem, prepared, True)(input, bias)
        assert relative_error(output, FFT.forward(problem, input, weight, bias, True)) <= 1e-6
    expected = oracle(input, weight, torch.zeros_like(output), (1, 1), padding, (1, 1))[0]
    expected = (expected + bias.double()[:, None, None]).relu()
    assert relative_error(output, expected) <= FORWARD_TOLERANCE


@each_isa
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_rounded_once(isa, format, dtype, epsilon):
    input, weight, padding = case(19, (15, 13), (9, 7), batch=2, format=format)
    input = input.to(dtype)
    with native.force_isa(isa):
        output, grad_output, grad_input, grad_weight = passes(input, weight, padding)
    assert output.dtype == grad_input.dtype == dtype
    expected = oracle(input, weight, grad_output, (1, 1), padding, (1, 1))
    assert relative_error(output, expected[0]) <= epsilon + FORWARD_TOLERANCE
    assert relative_error(grad_input, expected[1]) <= epsilon + FORWARD_TOLERANCE
    assert relative_error(grad_weight, expected[2]) <= epsilon + WEIGHT_TOLERANCE


@each_isa
@pytest.mark.parametrize("relu", [False, True])
def test_bias_and_relu_keep_nan_in_its_channel(isa, relu):
    input, weight, padding = case(16, (12, 12), (5, 5))
    input[0, 3, 4, 5] = float("nan")
    bias = torch.randn(16)
    with native.force_isa(isa):
        output, grad_output, *_ = passes(input, weight, padding, bias=bias, relu=relu)
    assert output[:, 3].isnan().all()
    rest = [channel for channel in range(16) if channel != 3]
    expected = oracle(input[:, rest], weight[rest], grad_output[:, rest], (1, 1), padding, (1, 1))
    expected = expected[0] + bias[rest].double()[:, None, None]
    expected = expected.relu() if relu else expected
    assert relative_error(output[:, rest], expected) <= FORWARD_TOLERANCE


@each_isa
def test_inputs_of_any_strides(isa):
    storage = torch.randn(2, 20, 30, 41)
    weight = torch.randn(20, 1, 5, 7)
    padding = (2, 2, 3, 3)
    views = (
        storage[:, :, 3:25:2, 1::3],
        storage.permute(0, 1, 3, 2),
        storage[:1, :1, :11, :13].expand(2, 20, 11, 13),
        storage.contiguous(memory_format=torch.channels_last)[:, :, 1:, 2:-1],
    )
    with native.force_isa(isa):
        for view in views:
            check(view, weight, padding)


def test_says_what_it_does_not_compute():
    input, weight, padding = case(4, (20, 20), (5, 5))
    strided = native_problem("forward", input, weight, padding, stride=(2, 2))
    assert not FFT.supports(strided).ok
    input, weight, padding = case(1, (600, 600), (211, 211))
    assert not FFT.supports(native_problem("forward", input, weight, padding)).ok

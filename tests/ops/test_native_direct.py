"""The native direct algorithm for every instruction set: sizes, tiles, layouts, types, threads."""

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

DIRECT = ALGORITHMS["direct"]
FORWARD_TOLERANCE, WEIGHT_TOLERANCE = 5e-7, 2e-6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def passes(input, weight, grad_output, *geometry):
    """Output, gradient of the input, gradient of the weight."""
    forward, grad_input, grad_weight = (
        native_problem(pass_, input, weight, *geometry)
        for pass_ in ("forward", "grad_input", "grad_weight")
    )
    return (
        DIRECT.forward(forward, input, weight, None, False),
        DIRECT.grad_input(grad_input, grad_output, weight),
        DIRECT.grad_weight(grad_weight, grad_output, input),
    )


def lay_out(tensor, layout):
    """The same values in memory of a layout, off alignment."""
    if layout == "NHWC":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # rows, columns and channels with gaps, an odd start
        n, c, h, w = tensor.shape
        whole = torch.full((n, c + 1, h + 2, 2 * w + 1), torch.nan, dtype=tensor.dtype)
        part = whole[:, 1:, 1:-1, 1::2]
        part.copy_(tensor)
        return part
    return tensor


def check(shape, kernel_size, padding, stride=(1, 1), dilation=(1, 1), layout="NCHW", scale=1):
    input = torch.randn(shape)
    weight = torch.randn(shape[1], 1, *kernel_size)
    problem = native_problem("forward", input, weight, padding, stride, dilation)
    assert DIRECT.supports(problem).ok
    grad_output = torch.randn(shape[0], shape[1], *problem.output_size)
    expected = oracle(input, weight, grad_output, stride, padding, dilation)
    results = passes(
        lay_out(input, layout), weight, lay_out(grad_output, layout), padding, stride, dilation
    )
    tolerances = (FORWARD_TOLERANCE, FORWARD_TOLERANCE, WEIGHT_TOLERANCE)
    # The scale of a sum of few products of random signs is the norm of its factors.
    floors = (weight, weight, grad_output.transpose(0, 1))
    for result, value, tolerance, floor in zip(results, expected, tolerances, floors, strict=True):
        assert result.shape == value.shape
        assert relative_error(result, value, floor) <= tolerance * scale


@each_isa
def test_forced_instruction_set_runs(isa):
    with native.force_isa(isa):
        assert native.isa() == isa
        check((1, 5, 9, 9), (3, 3), (1, 1, 1, 1))


@each_isa
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_geometry(isa, data):
    draw = data.draw
    axes = []
    for _ in "hw":
        size, taps = draw(st.integers(1, 24)), draw(st.integers(1, 15) | st.sampled_from([31, 63]))
        stride, dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (1, 3)]))
        low = dilation * (taps - 1) + 1 - size
        before = draw(st.integers(0, taps + 1))
        after = draw(st.integers(max(0, low - before), max(0, low - before) + taps))
        axes.append((size, taps, stride, dilation, (before, after)))
    heights, widths = axes
    batch, channels = draw(st.integers(1, 2)), draw(st.integers(1, 33))
    with native.force_isa(isa):
        check(
            (batch, channels, heights[0], widths[0]),
            (heights[1], widths[1]),
            (*heights[4], *widths[4]),
            (heights[2], widths[2]),
            (heights[3], widths[3]),
            draw(st.sampled_from(["NCHW", "NHWC", "sliced"])),
        )


@each_isa
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "sliced"])
def test_every_number_of_channels(isa, layout):
    with native.force_isa(isa):
        for channels in range(1, 34):
            check((1, channels, 5, 6), (3, 3), (1, 1, 1, 1), layout=layout)


@each_isa
@pytest.mark.parametrize(
    ("shape", "padding"),
    [
        ((3, 17, 70, 9), (1, 1, 1, 1)),  # tiles of rows
        ((1, 33, 6, 600), (1, 1, 1, 1)),  # and of columns
        ((5, 130, 7, 7), (0, 3, 2, 0)),
        ((2, 16, 3, 3), (0, 0, 0, 0)),
        ((2, 20, 5, 2), (4, 4, 3, 5)),
        ((40, 16, 56, 56), (1, 1, 1, 1)),  # long sums
        ((1, 520, 40, 40), (1, 1, 1, 1)),  # more than the caches hold
    ],
)
def test_3x3_filters_on_adjacent_channels(isa, shape, padding):
    with native.force_isa(isa):
        check(shape, (3, 3), padding, layout="NHWC")


@each_isa
@pytest.mark.parametrize("width", [*range(1, 32), 57])
def test_every_width_of_map_and_filter(isa, width):
    with native.force_isa(isa):
        for taps in (1, 2, 3, 4, 5, 6, 7, 8, 13, 31):
            pad = taps // 2
            check((1, 3, 4, width), (3, taps), (1, 1, pad, (taps - 1) // 2))


@each_isa
@pytest.mark.parametrize("taps", [3, 5, 7])
def test_small_filters_along_rows(isa, taps):
    """Every number of vectors of columns in a strip, with the filter off the map's middle."""
    with native.force_isa(isa):
        for width in (8, 9, 11, 12, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 112, 129):
            for padding in ((taps // 2,) * 4, (0, taps - 1, taps - 1, 0), (1, 0, 0, 1)):
                check((1, 2, 9, width), (taps, taps), padding)
        check((1, 1, 70, 40), (taps, taps), (1, 2, 1, 2))  # bands of one map


@each_isa
@pytest.mark.parametrize("channels", [8, 16, 37, 130, 520])
@pytest.mark.parametrize("taps", [3, 5, 7, 9])
@pytest.mark.parametrize("stride", [1, 2])
def test_small_filters_along_channels(isa, stride, taps, channels):
    """Every number of columns at once, few and many channels, the filter off the map's middle."""
    with native.force_isa(isa):
        for width in range(1, 17) if channels == 37 else (6, 31):
            for padding in ((taps // 2,) * 4, (taps, 0, taps - 1, 2)):
                if width + sum(padding[2:]) < taps:
                    continue
                check(
                    (2, channels, 9, width),
                    (taps, taps),
                    padding,
                    (stride, stride),
                    layout="NHWC",
                )
        check((1, channels, 70, 6), (taps, taps), (1, 2, 1, 2), (stride, stride), layout="NHWC")


@each_isa
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(3, 38, 90, 104), (1, 520, 40, 66), (1, 3, 610, 620)])
@pytest.mark.parametrize(("taps", "stride"), [(3, 1), (3, 2), (7, 1), (9, 1), (11, 1)])
def test_small_filters_on_images_that_outgrow_the_caches(isa, taps, stride, shape, layout):
    with native.force_isa(isa):
        for padding in ((taps // 2,) * 4, (0, 1, 2, 0)):
            check(shape, (taps, taps), padding, (stride, stride), layout=layout)


@each_isa
@pytest.mark.parametrize("taps", [7, 9, 11])
def test_sums_of_numbers_of_one_sign_are_as_exact(isa, taps):
    """Partial sums are nearly as large as their total: long ones would lose most."""
    input, weight = torch.rand(1, 256, 64, 64), torch.rand(256, 1, taps, taps)
    input, padding = lay_out(input, "NHWC"), (taps // 2,) * 4
    expected, *_ = oracle(input, weight, torch.zeros_like(input), (1, 1), padding, (1, 1))
    with native.force_isa(isa):
        problem = native_problem("forward", input, weight, padding)
        output = DIRECT.forward(problem, input, weight, None, False)
    assert relative_error(output, expected) <= FORWARD_TOLERANCE


@each_isa
@pytest.mark.parametrize("channels", [37, 128])
@pytest.mark.parametrize("taps", [3, 7])
def test_small_filters_packed_or_not_give_the_same(isa, taps, channels):
    input, weight = torch.randn(2, channels, 12, 13), torch.randn(channels, 1, taps, taps)
    bias, input = torch.randn(channels), lay_out(input, "NHWC")
    with native.force_isa(isa):
        for stride in (1, 2):
            problem = native_problem("forward", input, weight, (1, 1, 1, 1), (stride, stride))
            prepared = DIRECT.prepare(problem, pack_filters(weight))
            result = DIRECT.forward_prepared_of(problem, prepared, True)(input, bias)
            assert torch.equal(result, DIRECT.forward(problem, input, weight, bias, True))


@each_isa
@pytest.mark.parametrize("layout", ["NCHW", "sliced"])
@pytest.mark.parametrize("size", [(1, 1), (6, 2), (2, 4), (5, 6), (7, 7), (13, 8)])
@pytest.mark.parametrize("taps", [3, 5])
def test_small_filters_on_narrow_maps_give_the_same_in_every_layout(isa, taps, size, layout):
    """Packed maps, and patches of a map where it lies."""
    input, grad_output = torch.randn(2, 32, *size), torch.randn(2, 32, *size)
    weight, padding = torch.randn(32, 1, taps, taps), (taps // 2,) * 4
    with native.force_isa(isa):
        check((2, 19, *size), (taps, taps), padding, layout=layout)
        packed = passes(lay_out(input, layout), weight, lay_out(grad_output, layout), padding)
        in_place = passes(lay_out(input, "NHWC"), weight, lay_out(grad_output, "NHWC"), padding)
    for result, other in zip(packed[:2], in_place[:2], strict=True):
        assert torch.equal(result, other)


@each_isa
def test_rows_may_have_gaps(isa):
    input, weight = torch.randn(2, 3, 9, 40), torch.randn(3, 1, 5, 5)
    problem = native_problem("forward", input, weight, (2, 2, 2, 2))
    spread = torch.full((2, 3, 18, 50), torch.nan)[:, :, ::2, 5:45]
    spread.copy_(input)
    with native.force_isa(isa):
        result = DIRECT.forward(problem, spread, weight, None, False)
        assert torch.equal(result, DIRECT.forward(problem, input, weight, None, False))


@each_isa
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("size", "kernel_size"),
    [((90, 90), (9, 9)), ((3, 700), (3, 7)), ((300, 4), (31, 3)), ((70, 64), (3, 3))],
)
def test_tiles_of_large_maps_join(isa, layout, size, kernel_size):
    (top, left) = (kernel_size[0] // 2, kernel_size[1] // 2)
    with native.force_isa(isa):
        check((2, 18, *size), kernel_size, (top, top, left, left), layout=layout)


@each_isa
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "sliced"])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (12, 20), (10, 31), (32, 5), (9, 14), (32, 32)])
def test_filters_that_reach_from_every_pixel_to_every_other(isa, size, layout):
    height, width = size
    kernel_size = (2 * height - 1, 2 * width - 1)
    padding = (height - 1, height - 1, width - 1, width - 1)
    with native.force_isa(isa):
        check((2, 19, height, width), kernel_size, padding, layout=layout)


@each_isa
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("size", [7, 14])
def test_filters_that_reach_everywhere_of_many_channels(isa, size, layout, batch):
    channels, padding = 285, (size - 1,) * 4  # more groups than are read together
    input = lay_out(torch.randn(batch, channels, size, size), layout)
    grad_output = lay_out(torch.randn(input.shape), layout)
    weight = torch.randn(channels, 1, 2 * size - 1, 2 * size - 1)
    expected = oracle(input, weight, grad_output, (1, 1), padding, (1, 1))
    with native.force_isa(isa):
        for count in (1, 2, 3):
            with use_threads(count):
                results = passes(input, weight, grad_output, padding)
            for result, value in zip(results[:2], expected[:2], strict=True):
                assert relative_error(result, value) <= FORWARD_TOLERANCE


@each_isa
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (14, 7), (7, 14)])
@pytest.mark.parametrize("positive", ["input", "weight", "both"])
def test_filters_that_reach_everywhere_are_exact_for_positive_numbers(isa, size, positive):
    height, width = size
    input, weight = torch.randn(2, 64, *size), torch.randn(64, 1, 2 * height - 1, 2 * width - 1)
    grad_output, padding = torch.randn(input.shape), (height - 1, height - 1, width - 1, width - 1)
    if positive != "weight":
        input, grad_output = input.abs(), grad_output.abs()
    if positive != "input":
        weight = weight.abs()
    expected = oracle(input, weight, grad_output, (1, 1), padding, (1, 1))
    with native.force_isa(isa):
        results = passes(input, weight, grad_output, padding)
    for result, value in zip(results[:2], expected[:2], strict=True):
        assert relative_error(result, value) <= FORWARD_TOLERANCE


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize(("channels", "layout"), [(19, "NCHW"), (115, "NHWC")])
def test_bias_and_relu_after_filters_that_reach_everywhere(isa, dtype, size, channels, layout):
    input = lay_out(torch.randn(2, channels, size, size).to(dtype), layout)
    weight = torch.randn(channels, 1, 2 * size - 1, 2 * size - 1).to(dtype)
    bias = torch.randn(channels).to(dtype)
    problem = native_problem("forward", input, weight, (size - 1,) * 4)
    with native.force_isa(isa):
        result = DIRECT.forward(problem, input, weight, bias, True)
    sums = torch.nn.functional.conv2d(
        input.double(), weight.double(), bias.double(), padding=size - 1, groups=channels
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), sums.relu(), rtol=eps, atol=2e-5)


@pytest.mark.parametrize(("size", "taps"), [(56, 31), (28, 29), (14, 27), (7, 13)])
def test_accuracy_at_the_shapes_of_replknet(size, taps):
    check((1, 16, size, size), (taps, taps), (taps // 2,) * 4, layout="NHWC")


@each_isa
@pytest.mark.parametrize(
    ("dtype", "half_ulp"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "sliced"])
@pytest.mark.parametrize("size", [(1, 3), (2, 7), (9, 11), (4, 14), (3, 30)])
def test_half_precision_rounds_only_its_results(isa, dtype, half_ulp, layout, size):
    input = torch.randn(2, 35, *size).to(dtype)
    weight = torch.randn(35, 1, 5, 5).to(dtype)
    grad_output = torch.randn(2, 35, *size).to(dtype)
    padding = (2, 2, 2, 2)
    expected = oracle(input, weight, grad_output, (1, 1), padding, (1, 1))
    with native.force_isa(isa):
        results = passes(lay_out(input, layout), weight, lay_out(grad_output, layout), padding)
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == dtype
        error = (result.double() - value).abs()
        assert (error <= half_ulp * value.abs() * 1.001 + 1e-5).all()


@each_isa
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [16, 19])
@pytest.mark.parametrize("width", [9, 30])
def test_bias_and_relu(isa, layout, channels, width):
    input = lay_out(torch.randn(2, channels, 8, width), layout)
    weight, bias = torch.randn(channels, 1, 3, 3), torch.randn(channels)
    problem = native_problem("forward", input, weight, (1, 1, 1, 1))
    input[0, 0, 0, 0] = torch.nan
    with native.force_isa(isa):
        plain = DIRECT.forward(problem, input, weight, None, False)
        result = DIRECT.forward(problem, input, weight, bias, True)
    expected = torch.relu(plain + bias[:, None, None])  # keeps NaN
    assert result[0, 0, 0, 0].isnan()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@each_isa
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("taps", [3, 13, 31])
def test_nan_and_inf_stay_in_their_receptive_field(isa, layout, value, taps):
    pad = taps // 2
    input, weight = torch.randn(1, 17, 15, 18), torch.randn(17, 1, taps, taps)
    spoiled = input.clone()
    spoiled[0, 3, 0, 17] = value
    reached = torch.zeros(input.shape, dtype=torch.bool)
    reached[0, 3, : pad + 1, 17 - pad :] = True
    if pad > 17:
        reached[0, 3, : pad + 1] = True
    problem = native_problem("forward", lay_out(input, layout), weight, (pad,) * 4)
    with native.force_isa(isa):
        clean, result = (
            DIRECT.forward(problem, lay_out(x, layout), weight, None, False)
            for x in (input, spoiled)
        )
    assert not result[reached].isfinite().any()
    assert torch.equal(result[~reached], clean[~reached])


@each_isa
@pytest.mark.parametrize("taps", [3, 13])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_nan_reaches_only_the_taps_that_meet_it(isa, layout, taps):
    pad = taps // 2
    input, grad_output = torch.randn(2, 17, 15, 18), torch.randn(2, 17, 15, 18)
    # Lower taps never meet the first row, nor left ones the last column.
    input[1, 3, 0, 17] = torch.nan
    weight = torch.empty(17, 1, taps, taps)
    problem = native_problem("grad_weight", lay_out(input, layout), weight, (pad,) * 4)
    with native.force_isa(isa):
        gradient = DIRECT.grad_weight(problem, lay_out(grad_output, layout), lay_out(input, layout))
    reached = torch.zeros(weight.shape, dtype=torch.bool)
    reached[3, 0, : pad + 1, pad:] = True
    assert torch.equal(gradient.isnan(), reached)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("taps", [3, 7, 15])
def test_bits_do_not_depend_on_the_run_or_the_number_of_threads(channels, taps, layout):
    pad = taps // 2
    input, weight = torch.randn(3, channels, 40, 40), torch.randn(channels, 1, taps, taps)
    grad_output = torch.randn(3, channels, 40, 40)
    input, grad_output = lay_out(input, layout), lay_out(grad_output, layout)
    results = []
    for count in (1, 1, 2, 5):
        with use_threads(count):
            results.append(passes(input, weight, grad_output, (pad,) * 4))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@each_isa
@pytest.mark.parametrize("channels", [20, 285])
@pytest.mark.parametrize(("size", "taps"), [(9, 5), (7, 13), (10, 19)])
def test_prepared_filters_give_the_same_bits(isa, size, taps, channels):
    input, bias = torch.randn(2, channels, size, size), torch.randn(channels)
    weight = torch.randn(channels, 1, taps, taps)
    problem = native_problem("forward", input, weight, (taps // 2,) * 4)
    with native.force_isa(isa):
        prepared = DIRECT.prepare(problem, pack_filters(weight))
        result = DIRECT.forward_prepared_of(problem, prepared, False)(input, bias)
        assert torch.equal(result, DIRECT.forward(problem, input, weight, bias, False))


def test_expanded_input_is_read_in_place():
    input = torch.randn(1, 1, 9, 9).expand(2, 7, 9, 9)
    weight = torch.randn(7, 1, 3, 3)
    problem = native_problem("forward", input, weight, (1, 1, 1, 1))
    result = DIRECT.forward(problem, input, weight, None, False)
    assert torch.equal(result, DIRECT.forward(problem, input.contiguous(), weight, None, False))


def test_unsupported_problems_say_why():
    input, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 3, 3)
    both = native_problem("forward", input, weight, (1, 1, 1, 1), (2, 2), (2, 2))
    assert "stride (2, 2), dilation (2, 2)" in DIRECT.supports(both).reason
    double = native_problem("forward", input.double(), weight.double(), (1, 1, 1, 1))
    assert "float64" in DIRECT.supports(double).reason

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from replknet.ops import _binary
from replknet.ops.packed_pointwise import divide, pack, pointwise, pointwise_pair, why_not_native

ACTIVATE = {"identity": lambda x: x, "relu": F.relu, "gelu": F.gelu}
ISAS = _binary.library.rk_available_isas().decode().split(",") if _binary.library else []
# rows, in, out: one of each, tile and panel borders, rows whose addresses collide in the cache
SIZES = [
    (1, 1, 1),
    (6, 3, 31),
    (13, 16, 32),
    (14, 40, 33),
    (15, 512, 64),
    (49, 1024, 96),
    (49, 300, 1000),
    (197, 2048, 40),
    (1500, 24, 70),
]


@pytest.fixture(params=[*ISAS, "plain"])
def isa(request, monkeypatch):
    """Every instruction set of this machine, and PyTorch's operators."""
    if request.param == "plain":
        monkeypatch.setattr(_binary, "library", None)
        monkeypatch.setattr(_binary, "reason_missing", "it was not built")
        yield request.param
        return
    _binary.library.rk_force_isa(request.param.encode())
    yield request.param
    _binary.library.rk_force_isa(None)


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def layer(inputs, outputs, activation="identity", seed=0):
    weight, bias = randn(outputs, inputs, seed=seed) / inputs**0.5, randn(outputs, seed=seed + 1)
    exact = (weight.double(), bias.double(), ACTIVATE[activation])
    return pack(weight, bias, activation), exact


def exactly(x, exact):
    weight, bias, activate = exact
    return activate(F.linear(x.double(), weight, bias))


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 3e-6 * expected.abs().max()


@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_one_layer(isa, rows, inputs, outputs, activation):
    x, residual = randn(rows, inputs, seed=5), randn(rows, outputs, seed=6)
    product, exact = layer(inputs, outputs, activation)
    assert_near(pointwise(x, product), exactly(x, exact))
    assert_near(pointwise(x, product, residual), exactly(x, exact) + residual)


@pytest.mark.parametrize(("rows", "inputs", "hidden"), SIZES)
@pytest.mark.parametrize("outputs", [5, 64])
def test_two_layers(isa, rows, inputs, hidden, outputs):
    x, residual = randn(rows, inputs, seed=5), randn(rows, outputs, seed=6)
    first, exact_first = layer(inputs, hidden, "gelu")
    second, exact_second = layer(hidden, outputs, seed=3)
    expected = exactly(exactly(x, exact_first), exact_second)
    assert_near(pointwise_pair(x, first, second), expected)
    assert_near(pointwise_pair(x, first, second, residual), expected + residual)


@pytest.mark.parametrize(("rows", "width", "hidden"), [(49, 512, 96), (1500, 24, 70)])
def test_what_is_not_needed_any_more_is_overwritten(isa, rows, width, hidden):
    first, second = layer(width, hidden, "gelu")[0], layer(hidden, width, seed=3)[0]
    one = layer(width, width, "relu")[0]
    x, residual = randn(rows, width, seed=5), randn(rows, width, seed=6)
    expected = pointwise(x, one, residual)
    actual = pointwise(x, one, residual, overwrite=True)
    assert torch.equal(actual, expected)
    expected_pair = pointwise_pair(x, first, second, x)
    actual_pair = pointwise_pair(x, first, second, x, overwrite=True)
    assert torch.equal(actual_pair, expected_pair)
    if isa != "plain":
        assert actual.data_ptr() == residual.data_ptr()
        assert actual_pair.data_ptr() == x.data_ptr()


def test_gelu_is_the_exact_one(isa):
    x = torch.linspace(-12, 12, 4801)[:, None]
    identity = pack(torch.ones(1, 1), None, "gelu")
    assert (pointwise(x, identity) - F.gelu(x.double())).abs().max() <= 2e-6


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_maps_are_rows_of_pixels(isa, format):
    x = randn(2, 40, 3, 5, seed=5).contiguous(memory_format=format)
    residual = randn(2, 33, 3, 5, seed=6).contiguous(memory_format=format)
    first, exact_first = layer(40, 50, "relu")
    second, exact_second = layer(50, 33, seed=3)
    result = pointwise_pair(x, first, second, residual)
    expected = exactly(exactly(x.permute(0, 2, 3, 1), exact_first), exact_second)
    assert_near(result, expected.permute(0, 3, 1, 2) + residual)
    assert_near(pointwise(pointwise(x, first), second, residual), result)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("inputs", [40, 512])  # 512: large enough for another way
def test_pixels_of_images_without_height_and_width(isa, inputs):
    x = randn(2, 10, 10, inputs, seed=5)
    residual = randn(2, 10, 10, 512, seed=6)
    product, _ = layer(inputs, 512, "relu")
    maps = pointwise(x.permute(0, 3, 1, 2), product, residual.permute(0, 3, 1, 2))
    rows = pointwise(x.flatten(1, 2), product, residual.flatten(1, 2))
    maps = maps.permute(0, 2, 3, 1).flatten(1, 2)
    assert_near(rows, maps)
    assert isa == "plain" or torch.equal(rows, maps)


def test_other_channels_are_refused(isa):
    product = layer(4, 7)[0]
    known = r"\(n, 4\), \(N, pixels, 4\) or \(N, 4, H, W\)"
    with pytest.raises(ValueError, match=known + r", got \(3, 5\)"):
        pointwise(torch.zeros(3, 5), product)
    with pytest.raises(ValueError, match=r"got \(4, 3, 3\)"):
        pointwise(torch.zeros(4, 3, 3), product)
    with pytest.raises(ValueError, match=r"got \(4, 4, 3\)"):
        pointwise(torch.zeros(4, 4, 3), product)
    with pytest.raises(ValueError, match=r"residual must be \(3, 7\), got \(3, 4\)"):
        pointwise_pair(torch.zeros(3, 4), product, layer(7, 7)[0], torch.zeros(3, 4))


def test_no_rows(isa):
    assert pointwise(torch.zeros(0, 4), layer(4, 7)[0]).shape == (0, 7)
    large, x = layer(512, 512)[0], torch.zeros(0, 512, 10, 10)
    assert pointwise(x, large).shape == pointwise_pair(x, large, large).shape == x.shape
    assert pointwise(torch.zeros(0, 100, 512), large).shape == (0, 100, 512)


# images, map, in, hidden, out; by Strassen's method, by pairs of channels or by AMX
LARGE = [
    (1, (10, 11), 544, 1152, 512),  # several blocks of channels
    (3, (10, 11), 544, 1152, 512),  # and chunks or turns of rows
    (2, (20, 21), 96, 301, 85),  # more rows than weights, channels that fill no tile
    (1, (29, 30), 1056, 640, 97),  # an odd number of tiles of rows
]


@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize(("images", "size", "inputs", "width", "outputs"), LARGE)
def test_large_layers(isa, images, size, inputs, width, outputs, activation):
    x, residual = randn(images, inputs, *size, seed=5), randn(images, outputs, *size, seed=6)
    first, exact_first = layer(inputs, width, activation)
    second, exact_second = layer(width, outputs, seed=3)
    hidden = exactly(x.permute(0, 2, 3, 1), exact_first)
    assert_near(pointwise(x, first), hidden.permute(0, 3, 1, 2))
    expected = exactly(hidden, exact_second).permute(0, 3, 1, 2) + residual
    assert_near(pointwise_pair(x, first, second, residual), expected)
    assert_near(pointwise(pointwise(x, first), second, residual, overwrite=True), expected)


def test_large_layers_have_methods_of_their_own(isa):
    """Strassen's spoils the neighbour of an infinite pixel, pairs and AMX make a NaN of it."""
    x = torch.zeros(1, 512, 10, 10)
    x[0, 5, 0, 0] = torch.inf
    result = pointwise(x, layer(512, 512)[0])
    finite = result.isfinite().all(1).flatten()
    spoiled = 1 if isa in ("plain", "amx", "zen4") else 2
    assert finite.tolist() == [False] * spoiled + [True] * (100 - spoiled)
    assert result[0, :, 0, 0].isnan().all() == (isa in ("amx", "zen4"))


@pytest.mark.parametrize("isa", [i for i in ISAS if i in ("amx", "zen4")], indirect=True)
def test_pixels_of_every_magnitude_are_as_exact_as_in_float32(isa):
    """Two parts of 8 bits by AMX would miss the bound by 2^7, pairs without scales by far more.

    PyTorch's own error is 0.6 to 1.1e-6, as the kernel that it takes.
    """
    generator = torch.Generator().manual_seed(1)
    x = randn(1, 512, 16, 16) * 2.0 ** torch.randint(-40, 40, (1, 1, 16, 16), generator=generator)
    weight = randn(512, 512, seed=2)
    exact = F.conv2d(x.double(), weight.double()[..., None, None])

    def error(result):
        return ((result - exact).abs() / exact.abs().amax(1, keepdim=True)).max()

    result = pointwise(x, pack(weight, None))
    assert error(result) <= (2e-6 if isa == "zen4" else error(F.conv2d(x, weight[..., None, None])))


@pytest.mark.skipif(not ISAS, reason="there is no native core")
@pytest.mark.parametrize(
    ("width", "hidden", "size"),
    [
        (96, 384, (10, 5)),
        (512, 512, (10, 10)),
        (576, 1152, (10, 10)),
        (128, 1056, (11, 12)),
        (96, 96, (31, 30)),
    ],
)
def test_results_depend_neither_on_threads_nor_on_the_batch(width, hidden, size):
    x = randn(7, width, *size)
    first, second = layer(width, hidden, "gelu")[0], layer(hidden, width)[0]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(pointwise_pair(x, first, second))
    finally:
        torch.set_num_threads(threads)
    results.append(torch.cat([pointwise_pair(part, first, second) for part in x.split(2)]))
    results.append(pointwise(pointwise(x, first), second))
    assert all(torch.equal(result, results[0]) for result in results)


def test_strided_rows(isa):
    product, exact = layer(10, 6)
    x = randn(20, 30)[::2, 5:15]
    assert_near(pointwise(x, product, randn(6, 10).T), exactly(x, exact) + randn(6, 10).T)


def test_layers_keep_their_matrix(isa):
    weight = randn(45, 70) * 2.0 ** randn(70, seed=1).mul(9).round()
    product = pack(weight, None)
    assert product.weight.shape == (4, 70, 16)
    assert torch.equal(product.matrix(), weight)
    assert torch.equal(product.bias, torch.zeros(64))


@pytest.mark.parametrize("isa", [i for i in ISAS if i in ("amx", "zen4")], indirect=True)
def test_channels_of_every_size_are_as_exact_as_in_float32(isa):
    """As norms leave them that were folded into weights; 2e-4 by pairs of what is not divided."""
    size = randn(512, seed=4).mul(1.5).exp()
    x, weight = randn(1, 512, 16, 16) * size[:, None, None], randn(512, 512, seed=2) / size
    weight = weight * randn(512, 1, seed=5).mul(1.5).exp()
    exact = F.conv2d(x.double(), weight.double()[..., None, None])
    error = (pointwise(x, pack(weight, None)) - exact).abs().amax((0, 2, 3))
    assert (error / exact.abs().amax((0, 2, 3))).max() <= 3e-6


def test_weights_divided_for_one_instruction_set_suit_all(isa):
    (first, exact_first), (second, exact_second) = layer(512, 600, "gelu"), layer(600, 512)
    if first.input_sizes is None:
        first, second = divide(first), divide(second)
    x = randn(2, 100, 512)
    hidden = exactly(x, exact_first)
    assert_near(pointwise(x, first), hidden)
    assert_near(pointwise_pair(x, first, second, x), exactly(hidden, exact_second) + x)
    assert_near(pointwise_pair(x[:, :7], first, second), exactly(hidden, exact_second)[:, :7])


def test_why_not_native():
    if _binary.library is None:
        assert why_not_native(torch.ones(1)) == _binary.reason_missing
        return
    assert why_not_native(torch.ones(1), None) == ""
    assert "float64" in why_not_native(torch.ones(1).double())
    assert "not on meta" in why_not_native(torch.ones(1, device="meta"))
    wanted = torch.ones(1, requires_grad=True)
    assert "no gradient" in why_not_native(wanted)
    with torch.no_grad():
        assert why_not_native(wanted) == ""


def test_gradients_of_the_input():
    product, exact = layer(8, 8, "gelu")
    x = randn(5, 8).requires_grad_()
    pointwise_pair(x, product, product).sum().backward()
    y = x.detach().double().requires_grad_()
    exactly_twice = exact[2](F.linear(exact[2](F.linear(y, *exact[:2])), *exact[:2]))
    exactly_twice.sum().backward()
    assert_near(x.grad, y.grad)

"""Stems and transitions of large images, a band of rows at a time."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from replknet.deploy import banded
from replknet.deploy.banded import BandedSequential
from replknet.deploy.packed import FrozenDepthwiseConv2d, PackedConv2d


def units(strides=(2, 1, 2), taps=(3, 5, 3)) -> list[nn.Sequential]:
    torch.manual_seed(0)
    first, middle, last = (
        {"kernel_size": k, "stride": s, "padding": k // 2}
        for k, s in zip(taps, strides, strict=True)
    )
    dense, depthwise = nn.Conv2d(3, 16, **first), nn.Conv2d(16, 16, groups=16, **middle)
    pointwise, reduce = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, groups=24, **last)
    return [
        nn.Sequential(dense, nn.Identity(), nn.ReLU(inplace=True)).requires_grad_(False),
        nn.Sequential(FrozenDepthwiseConv2d(depthwise, relu=True), nn.Identity()),
        nn.Sequential(PackedConv2d(pointwise, "relu"), FrozenDepthwiseConv2d(reduce)),
    ]


@pytest.fixture
def rows_seen(monkeypatch):
    """Heights of the maps that depthwise layers are given."""
    seen = []
    forward = FrozenDepthwiseConv2d.forward

    def watched(self, x):
        seen.append(x.shape[2])
        return forward(self, x)

    monkeypatch.setattr(FrozenDepthwiseConv2d, "forward", watched)
    return seen


@pytest.mark.parametrize("strides", [(2, 1, 2), (1, 1, 1), (2, 2, 2), (1, 2, 1)])
@pytest.mark.parametrize("taps", [(3, 3, 3), (5, 7, 3)])
@pytest.mark.parametrize("size", [(64, 40), (37, 23), (9, 300)])
@pytest.mark.parametrize("batch", [1, 3])
def test_bands_join(monkeypatch, rows_seen, batch, size, taps, strides):
    layers = BandedSequential(*units(strides, taps))
    images = torch.randn(batch, 3, *size)
    expected = nn.Sequential.forward(layers, images)
    whole = max(rows_seen)
    for band_bytes in (1, 4000, 20000):
        monkeypatch.setattr(banded, "BAND_BYTES", band_bytes)
        rows_seen.clear()
        result = layers(images)
        assert_close(result, expected, rtol=1e-5, atol=1e-6)
        assert result.is_contiguous(memory_format=torch.channels_last)
        if size[0] > 30 and band_bytes == 4000:
            assert max(rows_seen) < whole  # nothing between the layers was whole


def test_a_band_takes_about_the_memory_it_may(monkeypatch, rows_seen):
    layers = BandedSequential(*units())
    monkeypatch.setattr(banded, "BAND_BYTES", 24 * 16 * 64 * 4)  # 16 rows of the widest map
    layers(torch.randn(1, 3, 400, 128))
    assert 16 <= max(rows_seen) <= 22  # with those that two bands read


def test_small_maps_stay_whole(rows_seen):
    BandedSequential(*units())(torch.randn(2, 3, 64, 40))
    assert rows_seen == [32, 32]


@pytest.mark.parametrize("name", ["1", "1.0"])
def test_hooks_see_whole_maps(monkeypatch, name):
    monkeypatch.setattr(banded, "BAND_BYTES", 1)
    layers, seen = BandedSequential(*units()), []
    watched = layers.get_submodule(name)
    watched.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layers(torch.randn(2, 3, 64, 40))
    assert seen == [(2, 16, 32, 20)]


def test_layers_that_read_an_unknown_window_are_refused():
    for stranger in (nn.MaxPool2d(2), nn.Conv2d(3, 8, 3, padding=3)):
        with pytest.raises(ValueError, match="what each of these layers reads"):
            BandedSequential(nn.Sequential(stranger))

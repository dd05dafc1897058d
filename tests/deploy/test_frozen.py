"""The inference layer of a depthwise convolution: what it keeps between calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replknet.deploy import packed
from replknet.deploy.packed import FrozenDepthwiseConv2d
from replknet.ops import native, use
from replknet.ops.native import NativeAlgorithm

CHANNELS = 20


def layer_and_conv() -> tuple[FrozenDepthwiseConv2d, nn.Conv2d]:
    conv = nn.Conv2d(CHANNELS, CHANNELS, 13, padding=6, groups=CHANNELS).requires_grad_(False)
    return FrozenDepthwiseConv2d(conv), conv


def maps(batch: int = 1, size: int = 7) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, size, size)


@pytest.fixture
def prepared(monkeypatch) -> list[int]:
    """Heights of the maps for which filters were prepared, which only the native core does."""
    if native.why_missing():
        pytest.skip("there is no native core")
    heights = []
    prepare = packed.prepare_forward

    def counted(problem, filters, relu):
        heights.append(problem.height)
        return prepare(problem, filters, relu)

    monkeypatch.setattr(packed, "prepare_forward", counted)
    return heights


def test_filters_are_prepared_once_for_any_batch_and_memory_format(prepared):
    layer, conv = layer_and_conv()
    for batch in range(1, 2 * FrozenDepthwiseConv2d.KEPT_CALLS):
        for format in (torch.contiguous_format, torch.channels_last):
            x = maps(batch).contiguous(memory_format=format)
            torch.testing.assert_close(layer(x), conv(x))
            assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert prepared == [7]
    assert len(layer._computes) <= FrozenDepthwiseConv2d.KEPT_CALLS


def test_filters_of_the_last_sizes_are_kept(prepared):
    layer, conv = layer_and_conv()
    for size in (7, 8, 7, 9, 8, 7):
        x = maps(size=size)
        torch.testing.assert_close(layer(x), conv(x))
    assert prepared == [7, 8, 9, 7]


@pytest.mark.parametrize("change", ["in place", "another tensor", "by data"])
def test_other_filters_are_prepared_anew(change, prepared):
    layer, conv = layer_and_conv()
    x = maps()
    layer(x)
    if change == "in place":
        layer.filters.mul_(2)
    elif change == "another tensor":
        layer.filters = layer.filters * 2
    else:
        layer.filters.data = layer.filters * 2
    torch.testing.assert_close(layer(x), F.conv2d(x, 2 * conv.weight, conv.bias, 1, 6, 1, CHANNELS))
    assert prepared == [7, 7]


def test_another_bias_is_seen():
    layer, conv = layer_and_conv()
    x = maps()
    layer(x)
    layer.bias = layer.bias + 1
    torch.testing.assert_close(layer(x), conv(x) + 1)
    layer.bias = layer.bias.repeat_interleave(2)[::2]
    torch.testing.assert_close(layer(x), conv(x) + 1)
    layer.bias = None
    torch.testing.assert_close(layer(x), conv(x) - conv.bias[:, None, None])


def test_a_bias_of_another_dtype(prepared):
    layer, conv = layer_and_conv()
    layer.bias = layer.bias.double()
    x = maps()
    torch.testing.assert_close(layer(x), conv(x))


def test_algorithm_instruction_set_and_threads_are_those_of_the_call(monkeypatch, prepared):
    used = []
    compute_of = NativeAlgorithm.forward_prepared_of

    def watched(self, *arguments):
        used.append((self.name, native.isa(), torch.get_num_threads()))
        return compute_of(self, *arguments)

    monkeypatch.setattr(NativeAlgorithm, "forward_prepared_of", watched)
    layer, conv = layer_and_conv()
    x, before = maps(), torch.get_num_threads()
    best = native.isa()
    for _ in range(2):  # the second time all is at hand
        layer(x)
        with use("fft"):
            torch.testing.assert_close(layer(x), conv(x))
        with native.force_isa("baseline"):
            torch.testing.assert_close(layer(x), conv(x))
        torch.set_num_threads(3)
        try:
            layer(x)
        finally:
            torch.set_num_threads(before)
    assert used[0] == ("direct", best, before)
    assert {("fft", best, before), ("direct", "baseline", before), ("direct", best, 3)} <= set(used)


def test_a_map_whose_numbers_are_negated_lazily():
    layer, conv = layer_and_conv()
    x = torch.complex(maps(), maps()).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(layer(x), conv(x))

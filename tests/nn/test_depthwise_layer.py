"""DepthwiseConv2d is nn.Conv2d in everything but speed."""

import copy
import pickle

import pytest
import torch
from torch import nn

from replknet.nn import DepthwiseConv2d

OPTIONS = [
    {},
    {"padding": 3},
    {"padding": "same", "bias": False},
    {"padding": "valid", "dilation": 2},
    {"padding": (3, 1), "stride": (2, 1)},
    {"padding": 3, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular"},
    {"padding": (2, 0), "padding_mode": "replicate", "stride": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_agrees_with_conv2d(options):
    torch.manual_seed(0)
    ours = DepthwiseConv2d(6, 6, (7, 5), **options)
    reference = nn.Conv2d(6, 6, (7, 5), groups=6, **options)
    reference.load_state_dict(ours.state_dict())
    assert ours.extra_repr() == reference.extra_repr()
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(ours, name) == getattr(reference, name)
    for size in ((2, 6, 15, 17), (6, 15, 17)):
        input = torch.randn(size)
        torch.testing.assert_close(ours(input), reference(input), rtol=1e-5, atol=1e-5)


def test_fx_traces_it():
    torch.manual_seed(0)
    network = nn.Sequential(DepthwiseConv2d(6, 6, 7, padding=3), nn.ReLU())
    input = torch.randn(2, 6, 15, 17)
    assert torch.equal(torch.fx.symbolic_trace(network)(input), network(input))


def test_starts_from_the_same_random_weights():
    torch.manual_seed(3)
    ours = DepthwiseConv2d(6, 6, 7)
    torch.manual_seed(3)
    reference = nn.Conv2d(6, 6, 7, groups=6)
    assert torch.equal(ours.weight, reference.weight)
    assert torch.equal(ours.bias, reference.bias)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_can_be_copied_and_pickled(clone):
    layer = DepthwiseConv2d(4, 4, 5, padding="same")
    input = torch.randn(1, 4, 8, 8)
    copied = clone(layer)
    assert type(copied) is DepthwiseConv2d
    assert torch.equal(copied(input), layer(input))
    assert copied.weight is not layer.weight


@pytest.mark.parametrize(("out_channels", "groups"), [(8, 4), (4, 2), (4, 1)])
def test_refuses_what_is_not_depthwise(out_channels, groups):
    with pytest.raises(ValueError, match=rf"4, {out_channels} and {groups}; use nn.Conv2d"):
        DepthwiseConv2d(4, out_channels, 3, groups=groups)


def test_moves_to_other_dtypes_and_the_meta_device():
    layer = DepthwiseConv2d(4, 4, 5, padding=2)
    assert layer.bfloat16()(torch.zeros(1, 4, 6, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.to("meta")(torch.zeros(1, 4, 6, 6, device="meta").bfloat16()).is_meta
    assert DepthwiseConv2d(4, 4, 5, device="meta", dtype=torch.float64).weight.is_meta

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_networks import Network, RepVGGBlock, randomize

from replknet.deploy import compare, fuse, reparameterize
from replknet.deploy.equivalence import Size
from replknet.models import create_model


class Outputs(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.values = values

    def forward(self):
        return self.values


def test_figures():
    reference = Outputs(torch.tensor([[1.0, 3.0], [5.0, 3.0]]))
    other = Outputs(torch.tensor([[1.0, 2.5], [5.0, 6.0]]))
    result = compare(reference, other)
    assert result.difference == 3
    assert result.spread == pytest.approx(2**0.5)
    assert result.relative == pytest.approx(3 / 2**0.5)
    assert result.agreement == 0.5


def test_nan_is_no_agreement():
    result = compare(Outputs(torch.ones(1, 2)), Outputs(torch.full((1, 2), torch.nan)))
    assert not result.relative <= 1e9


def test_different_outputs_are_refused():
    with pytest.raises(ValueError, match=r"\[\(1, 2\)\] against \[\(2, 1\)\]"):
        compare(Outputs(torch.ones(1, 2)), Outputs(torch.ones(2, 1)))
    with pytest.raises(ValueError, match="hold no numbers"):
        compare(Outputs(torch.ones(0, 2)), Outputs(torch.ones(0, 2)))


def test_modes_are_restored_and_sizes_counted():
    model = Network(RepVGGBlock(8)).train()
    model.norm.eval()
    result = compare(model, fuse(reparameterize(model)), torch.randn(1, 3, 8, 8))
    assert model.training
    assert not model.norm.training
    kernels = 8 * 3 * 9 + 8 * 8 * 9 + 8 * 8
    assert result.before == Size(kernels + 5 * 16 + 45, convolutions=3, norms=5)
    assert result.after == Size(kernels - 64 + 2 * 8 + 45, convolutions=2, norms=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replknet_31b", "replknet_31l"])
def test_published_networks_stay_the_same_function(name):
    model = randomize(create_model(name)).double()
    image = torch.randn(2, 3, 64, 64).double()
    merged = reparameterize(model)
    fused = fuse(merged)
    other_order = reparameterize(fuse(model))
    twice = fuse(reparameterize(fused))
    for converted in (merged, fused, other_order, twice):
        result = compare(model, converted, image)
        assert result.relative <= 1e-10
    assert result.after.norms == 0
    for network in (model, merged, twice):
        network.float()
    for converted in (merged, twice):
        result = compare(model, converted, image.float())
        assert result.relative <= 1e-4
        assert result.agreement == 1

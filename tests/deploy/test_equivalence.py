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


ORDERS = {
    "merged": reparameterize,
    "merged, fused": lambda model: fuse(reparameterize(model)),
    "fused, merged": lambda model: reparameterize(fuse(model)),
    "both twice": lambda model: fuse(reparameterize(fuse(reparameterize(model)))),
}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", ["replknet_31b", "replknet_31l"])
def test_published_networks_stay_the_same_function(name, dtype, tolerance):
    model = randomize(create_model(name)).to(dtype)
    image = torch.randn(2, 3, 64, 64, dtype=dtype)
    orders = list(ORDERS) if dtype == torch.float64 else ["both twice"]
    for order in orders:  # one at a time: a copy of 31L takes 1.4 GB in float64
        result = compare(model, ORDERS[order](model), image)
        assert result.relative <= tolerance, order
        assert result.agreement == 1
        assert (result.after.norms == 0) == (order != "merged")

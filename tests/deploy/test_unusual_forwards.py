"""Networks whose forwards use their modules in other ways than one call each."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_networks import randomize

from replknet.deploy import compare, fuse, reparameterize, unfused
from replknet.deploy.optimize import optimization_report, optimize
from replknet.deploy.plain import on_pytorch
from replknet.nn import DepthwiseConv2d
from replknet.ops import _binary

pytestmark = pytest.mark.filterwarnings("ignore:optimize keeps PyTorch")  # without a native core
ACTIVATION = nn.ReLU()


class Unregistered(nn.Module):
    """A softmax made in the forward, an activation of the module, and a layer in a list."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.teacher = [nn.Conv2d(8, 8, 1)]

    def forward(self, x):
        return nn.Softmax(dim=1)(ACTIVATION(self.norm(self.conv(x)))) + self.teacher[0](x)


class Listed(nn.Module):
    """Two layers that are called out of a list."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.order = [self.conv, self.norm]

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


class Indexed(nn.Module):
    """The layers of a sequence by themselves; what is between them is used, too."""

    def __init__(self, *layers):
        super().__init__()
        self.unit = nn.Sequential(*layers)

    def forward(self, x):
        between = self.unit[0](x)
        return between + self.unit[1](between)


class IndexedOnOddMaps(Indexed):
    """The same where fx cannot follow."""

    def forward(self, x):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return super().forward(x)


class Iterated(nn.Module):
    """Features after each layer of a sequence."""

    def __init__(self, *layers):
        super().__init__()
        self.unit = nn.Sequential(*layers)

    def forward(self, x):
        features = []
        for layer in self.unit:
            x = layer(x)
            features.append(x)
        return torch.cat(features, 1)


class IndexedTwice(nn.Module):
    """The layers of a sequence in a list, and the weight of one of another."""

    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList([nn.Sequential(conv(), nn.ReLU()) for _ in range(2)])

    def forward(self, x):
        between = self.units[0][0](x)
        return self.units[0][1](between) + between * self.units[1][0].weight.mean()


class ReadsANorm(nn.Module):
    """The epsilon of a norm, beside a call of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm.eps


class ReadsWeights(nn.Module):
    """A depthwise convolution by the function, with the weight of a layer."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = F.conv2d(x, self.depthwise.weight, padding=1, groups=8)
        return F.conv2d(self.point(x), self.point.weight)


class ReadsABlock(nn.Module):
    """What belongs to a block with branches, without a call of the block."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.scale = 2.0

        def forward(self, x):
            return self.one(x) + self.two(x)

    def __init__(self):
        super().__init__()
        self.block = self.Block()

    def forward(self, x):
        return self.block(x) * self.block.scale + self.block.one(x)


def conv(kernel_size=1, **options):
    return nn.Conv2d(8, 8, kernel_size, padding=kernel_size // 2, **options)


NETWORKS = {
    "unregistered": Unregistered,
    "listed": Listed,
    "indexed pointwise": lambda: Indexed(conv(), nn.ReLU()),
    "indexed depthwise": lambda: Indexed(conv(5, groups=8), nn.ReLU()),
    "indexed dense": lambda: Indexed(conv(3), nn.ReLU()),
    "indexed norm": lambda: Indexed(conv(), nn.BatchNorm2d(8)),
    "indexed where fx cannot follow": lambda: IndexedOnOddMaps(conv(), nn.ReLU()),
    "indexed norm where fx cannot follow": lambda: IndexedOnOddMaps(conv(), nn.BatchNorm2d(8)),
    "iterated": lambda: Iterated(conv(), nn.BatchNorm2d(8), nn.ReLU()),
    "indexed twice": IndexedTwice,
    "norm": ReadsANorm,
    "weights": ReadsWeights,
    "block": ReadsABlock,
    "volumes": lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Conv3d(4, 3, 1), nn.Flatten(1)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "deploy", [reparameterize, fuse, lambda m: fuse(reparameterize(m)), optimize]
)
def test_results_stay(name, deploy):
    torch.manual_seed(0)
    network, x = randomize(NETWORKS[name]()), torch.randn(2, 8, 9, 11)
    assert compare(network, deploy(network), x).relative < 1e-4


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (7, 2)])
def test_one_channel_and_maps_without_a_batch(channels, kernel_size, stride):
    torch.manual_seed(0)
    options = {"stride": stride, "padding": kernel_size // 2}
    for groups in {1, channels}:
        layer = nn.Conv2d(channels, channels, kernel_size, groups=groups, **options).eval()
        fast = optimize(layer)
        for size in ((2, channels, 8, 8), (channels, 5, 8)):
            x = torch.randn(size)
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-5)


def test_two_layers_as_one_on_a_map_without_a_batch():
    torch.manual_seed(0)
    network = randomize(nn.Sequential(conv(), nn.GELU(), conv()))
    x = torch.randn(8, 5, 8)
    torch.testing.assert_close(optimize(network)(x), network(x), rtol=1e-4, atol=1e-5)


def test_layers_that_stay_are_told():
    report = optimization_report(optimize(ReadsWeights()))
    assert set(report.left_alone) == {"depthwise", "point"}
    assert "in another way than by a call" in report.left_alone["point"]
    assert list(unfused(IndexedOnOddMaps(conv(), nn.BatchNorm2d(8)))) == ["unit.1"]


@pytest.mark.skipif(_binary.library is None, reason="only the native core has packed filters")
def test_filters_at_the_address_of_others_are_prepared_anew():
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 13, padding=6, groups=64, bias=False).eval()
    fast, x = optimize(layer), torch.randn(1, 64, 5, 5)
    original, expected = fast.filters.clone(), layer(x)
    for scale in (1.0, 2.0, 3.0, 4.0):
        fast.filters = None  # frees its memory
        fast.filters = original * scale
        torch.testing.assert_close(fast(x), scale * expected, rtol=1e-4, atol=1e-4)


def test_a_forward_of_an_instance_is_kept():
    torch.manual_seed(0)
    network = randomize(nn.Sequential(conv(3), nn.BatchNorm2d(8)))
    of_class = network[0].forward
    network[0].forward = lambda x: 2 * of_class(x)
    x = torch.randn(2, 8, 9, 9)
    for deploy in (fuse, reparameterize, optimize):
        # The copy's forward is that of the original, which this does not change.
        torch.testing.assert_close(deploy(network)(x), network(x), rtol=1e-4, atol=1e-4)


def test_subclasses_of_our_layers_stay_what_they_are():
    class Twice(DepthwiseConv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    network, x = nn.Sequential(Twice(8, 8, 3)), torch.randn(1, 8, 9, 9)
    assert torch.equal(on_pytorch(network)(x), network(x))

"""What traces, transforms or counts an optimized network sees PyTorch's operators."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from toy_networks import randomize

from replknet.deploy.optimize import optimize
from replknet.models.replknet import RepLKNet

# Without a native core the network is but folded; all this holds for it, too.
pytestmark = pytest.mark.filterwarnings("ignore:optimize keeps PyTorch")

X = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair():
    """A network and the same optimized: 1x1, depthwise and two layers as one call."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2, groups=16)]
    network = nn.Sequential(*layers, nn.Conv2d(16, 32, 1), nn.GELU(), nn.Conv2d(32, 16, 1))
    network.eval().requires_grad_(False)
    return network, optimize(network)


@pytest.mark.filterwarnings("ignore")  # of tracers, about the shapes that are checked
@pytest.mark.parametrize(
    "trace",
    [
        lambda f: torch.compile(f, backend="eager", fullgraph=True),
        lambda f: torch.jit.trace(f, X),
        lambda f: make_fx(f)(X),
        lambda f: lambda x: vmap(f)(x[:, None]).squeeze(1),
    ],
    ids=["compile", "jit.trace", "make_fx", "vmap"],
)
@torch.no_grad()
def test_traced(pair, trace):
    network, fast = pair
    assert_close(trace(fast)(X), network(X), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_whole_network_compiles():
    torch.manual_seed(0)
    network = randomize(RepLKNet((13, 7), (1, 2), (16, 40), num_classes=10))
    image, fast = torch.randn(2, 3, 64, 64), optimize(network)
    compiled = torch.compile(fast, backend="eager")
    assert_close(compiled(image), fast(image), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # PyTorch's own, in jvp
def test_tangents(pair):
    network, fast = pair
    tangent = torch.randn_like(X)
    expected = jvp(network, (X,), (tangent,))[1]
    assert_close(jvp(fast, (X,), (tangent,))[1], expected, rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(fast(forward_ad.make_dual(X, tangent))).tangent
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_operations_are_counted(pair):
    totals = []
    for network in pair:
        with FlopCounterMode(display=False) as counter:
            network(X)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_another_default_device(pair):
    network, fast = pair
    with torch.device("meta"):
        result = fast(X)
    assert_close(result, network(X), rtol=1e-5, atol=1e-5)

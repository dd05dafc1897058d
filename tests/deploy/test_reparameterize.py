from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm import create_model as create_timm_model
from timm.utils.model import reparameterize_model
from torch import nn
from toy_networks import (
    EvenBlock,
    ListBlock,
    Network,
    RectangularBlock,
    RepVGGBlock,
    ShortcutBlock,
    conv_bn,
    count,
    networks,
    randomize,
)

from replknet.deploy import compare, fuse, reparameterize
from replknet.models import create_model
from replknet.nn import DepthwiseConv2d

NAMES = list(networks())
ORDERS = {
    "reparameterize": reparameterize,
    "reparameterize twice": lambda model: reparameterize(reparameterize(model)),
    "reparameterize, fuse": lambda model: fuse(reparameterize(model)),
    "fuse, reparameterize": lambda model: reparameterize(fuse(model)),
    "both twice": lambda model: fuse(reparameterize(fuse(reparameterize(model)))),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_computes_the_same_function(name, order, dtype, tolerance):
    model = randomize(networks()[name]).to(dtype)
    merged = ORDERS[order](model)
    result = compare(model, merged, torch.randn(2, 3, 13, 17, dtype=dtype))
    assert result.relative <= tolerance
    assert result.after.convolutions < result.before.convolutions
    assert all(parameter.dtype == dtype for parameter in merged.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_one_convolution_remains_of_each_block(name):
    model = networks()[name]
    merged = reparameterize(model.eval())
    blocks = {"identity norm": 2, "rectangular": 2, "nested": 2}.get(name, 1)
    assert count(merged, nn.Conv2d) == 1 + blocks  # the stem is not a block


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_networks_of_timm(name):
    model = randomize(create_timm_model(name)).double()
    merged = fuse(reparameterize(model))
    assert compare(model, merged, torch.randn(1, 3, 64, 64).double()).relative <= 1e-10
    assert count(merged, nn.modules.batchnorm._BatchNorm) == 0
    assert count(merged, nn.Conv2d) == {"repvgg_a0": 22, "mobileone_s0": 43}[name]


def test_kernel_covers_all_branches():
    merged = reparameterize(RectangularBlock(4).eval())
    assert [m.kernel_size for m in merged.modules() if isinstance(m, nn.Conv2d)] == [(11, 11)]
    merged = reparameterize(EvenBlock(4).eval())
    (convolution,) = (m for m in merged.modules() if isinstance(m, nn.Conv2d))
    assert (convolution.kernel_size, convolution.padding, convolution.groups) == ((4, 4), (1, 1), 2)


def test_depthwise_class_survives():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = DepthwiseConv2d(4, 4, 7, padding=3)
            self.two = nn.Conv2d(4, 4, 3, padding=1, groups=4)

        def forward(self, x):
            return self.one(x) + self.two(x)

    assert count(reparameterize(Block()), DepthwiseConv2d) == 1


class Pair(nn.Module):
    """Sum of two layers, one of them possibly something that must not be merged."""

    def __init__(self, one: nn.Module, two: nn.Module):
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x):
        return self.one(x) + self.two(x)


class Returned(Pair):
    def forward(self, x):
        one = self.one(x)
        return one + self.two(x), one


class Overwritten(Pair):
    def forward(self, x):
        x = x * 2
        one = self.one(x)
        x.relu_()
        return one + self.two(x)


class Untraceable(Pair):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else self.one(x)


class Optional(Pair):
    def forward(self, x, both=True):
        return self.one(x) + self.two(x) if both else self.one(x)


def _plain(**options):
    return nn.Conv2d(4, 4, 3, **{"padding": 1, **options})


ALONE = {
    "other groups": Pair(_plain(), _plain(groups=4)),
    "reflected border": Pair(_plain(), _plain(padding_mode="reflect")),
    "activation in a branch": Pair(_plain(), nn.Sequential(_plain(), nn.ReLU())),
    "two convolutions in a branch": Pair(_plain(), nn.Sequential(_plain(), _plain())),
    "norm in front": Pair(_plain(), nn.Sequential(nn.BatchNorm2d(4), _plain())),
    "shortcut": Pair(_plain(), nn.Identity()),
    "uneven border": Pair(_plain(), nn.Conv2d(4, 4, 2, padding="same")),
    "statistics of the batch": Pair(
        _plain(), nn.Sequential(_plain(), nn.BatchNorm2d(4, track_running_stats=False))
    ),
    "computed weight": Pair(_plain(), nn.utils.parametrizations.weight_norm(_plain())),
    "branch also returned": Returned(_plain(), _plain()),
    "input overwritten": Overwritten(_plain(), _plain()),
    "depends on values": Untraceable(_plain(), _plain()),
    "optional argument": Optional(_plain(), _plain()),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("reason", ALONE)
def test_left_alone(reason):
    model = randomize(copy.deepcopy(ALONE[reason]))
    merged = reparameterize(model)
    assert count(merged, nn.Conv2d) == count(model, nn.Conv2d)
    assert type(merged) is type(model)
    assert compare(model, merged, torch.randn(2, 4, 9, 9)).difference == 0


def test_watched_branch_is_left_alone():
    model = ShortcutBlock(4).eval()
    seen = []
    model.one.register_forward_hook(lambda module, args, output: seen.append(output))
    reparameterize(model)(torch.randn(1, 4, 5, 5))
    assert len(seen) == 1


def test_shared_block_is_merged_once():
    block = RepVGGBlock(8)
    model = randomize(Network(block, nn.ReLU(), block)).double()
    merged = reparameterize(model)
    assert merged.body[0] is merged.body[2]
    assert compare(model, merged, torch.randn(1, 3, 9, 9).double()).relative <= 1e-12


def test_input_is_untouched():
    model = randomize(networks()["identity norm"]).train()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    merged = reparameterize(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert not merged.training
    assert all(not module.training for module in merged.modules())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in merged.parameters()
    }
    assert not shared


def test_keeps_dtype_device_and_frozen_parameters():
    model = networks()["rectangular"].to(torch.bfloat16)
    model.body[0].requires_grad_(False)
    merged = reparameterize(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in merged.body[0].parameters())
    assert all(p.requires_grad for p in merged.body[2].parameters())
    with torch.device("meta"):
        merged = reparameterize(networks()["rectangular"])
    assert {p.device.type for p in merged.parameters()} == {"meta"}


def test_result_can_be_pickled_and_copied():
    model = randomize(networks()["identity norm"])
    merged = reparameterize(model)
    image = torch.randn(1, 3, 9, 9)
    for twin in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert compare(merged, twin, image).difference == 0


def test_two_sums_in_one_forward():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([_plain() for _ in range(8)])

        def forward(self, x):
            first, second, third, fourth, *last = self.layers
            y = first(x) + second(x)
            z = third(y.relu()) + fourth(y.relu())  # of two different tensors: not merged
            a, b, c, d = (layer(part) for layer, part in zip(last, (x, z, x, z), strict=True))
            return a + b + c + d - y

    model = Block().double().eval()
    merged = reparameterize(model)
    names = [name for name, _ in merged.named_children()]
    assert names == ["reparam_conv", "layers", "reparam_conv_1", "reparam_conv_2"]
    assert count(merged, nn.Conv2d) == 5
    assert compare(model, merged, torch.randn(1, 4, 9, 9).double()).relative <= 1e-12


def test_merged_names_of_other_networks():
    merged = reparameterize(Network(ListBlock(8), RepVGGBlock(8)))
    names = {name.rpartition(".")[0] for name in merged.body.state_dict()}
    assert names == {"0.reparam_conv", "1.reparam_conv"}


@pytest.mark.parametrize("small_kernel", [5, None])
def test_has_the_structure_of_merged_and_fused_checkpoints(small_kernel):
    options = {"small_kernel": small_kernel, "num_classes": 7}
    model = randomize(create_model("replknet_nano", **options))
    image = torch.randn(2, 3, 32, 32)
    for form, converted in (
        ("merged", reparameterize(model)),
        ("fused", fuse(reparameterize(model))),
    ):
        built = create_model("replknet_nano", form=form, **options)
        built.load_state_dict(converted.state_dict(), strict=True)
        assert compare(model, built, image).relative <= 1e-4


def test_branches_of_a_converted_replknet_are_merged():
    model = randomize(create_model("replknet_nano"))
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    merged = reparameterize(synchronized)
    assert count(merged, DepthwiseConv2d) == count(reparameterize(model), DepthwiseConv2d)
    assert count(merged, nn.Conv2d) < count(model, nn.Conv2d)
    assert compare(model, merged, torch.randn(1, 3, 32, 32)).relative <= 1e-4


@pytest.mark.parametrize("first", [fuse, reparameterize, lambda model: model])
def test_timm_merges_in_place_too_in_any_order(first):
    model = randomize(create_model("replknet_nano"))
    merged = reparameterize_model(first(model))
    assert count(merged, DepthwiseConv2d) == count(reparameterize(model), DepthwiseConv2d)
    assert compare(model, merged, torch.randn(1, 3, 32, 32)).relative <= 1e-4


def test_conv_without_partner_is_kept():
    model = nn.Sequential(conv_bn(3, 4, 3, 1), nn.ReLU())
    assert count(reparameterize(model), nn.BatchNorm2d) == 1

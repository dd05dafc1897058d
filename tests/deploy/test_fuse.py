from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm import create_model as create_timm_model
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SelectAdaptivePool2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from toy_networks import count, networks, randomize

from replknet.deploy import compare, fuse, unfused
from replknet.deploy.folding import NORMS
from replknet.models import create_model

IMAGE = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)).double()


def seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


class Function(nn.Module):
    """Layers under the names a, b, c ..., and a function of them and the input."""

    def __init__(self, function, *layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in zip("abcd", layers, strict=False):
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs=4, outputs=4, size=3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **options)


def norm(channels=4, **options) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def head(*between: nn.Module) -> nn.Sequential:
    return seq(norm(), *between, nn.Linear(4, 3))


def levels(model, x):
    return [model.b(model.a(x)), model.b(model.a(F.max_pool2d(x, 2)))]


FOLDED = {
    "after a convolution": seq(conv(padding=1, bias=False), norm()),
    "after a grouped convolution with bias": seq(conv(4, 8, groups=2, stride=2), norm(8)),
    "without affine parameters": seq(conv(padding=1), norm(affine=False)),
    "behind no-ops": seq(conv(), nn.Dropout2d(0.5), nn.Identity(), norm()),
    "before a 1x1 convolution": seq(norm(), conv(4, 6, 1)),
    "before an unpadded convolution": seq(norm(), conv(4, 8, 3, groups=2, bias=False, stride=2)),
    "before padding='same' of 1x1": seq(norm(), conv(4, 6, 1, padding="same")),
    "before a strided depthwise convolution": seq(norm(), conv(4, 8, 2, groups=4, stride=2)),
    "on both sides": seq(norm(), conv(4, 6, 1), norm(6), nn.ReLU()),
    "in a row": seq(norm(), norm(), conv(4, 6, 1), norm(6), norm(6)),
    "synchronised": seq(conv(), nn.SyncBatchNorm(4)),
    "frozen": seq(conv(), FrozenBatchNorm2d(4)),
    "frozen in front": seq(FrozenBatchNorm2d(4), conv()),
    "with an activation": seq(conv(), BatchNormAct2d(4), conv()),
    "synchronised with an activation": seq(conv(), SyncBatchNormAct(4)),
    "frozen with an activation": seq(conv(), FrozenBatchNormAct2d(4, act_layer=nn.SiLU)),
    "before pooling": head(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)),
    "before timm's pooling": head(SelectAdaptivePool2d(flatten=True)),
    "before timm's other pooling": head(SelectAdaptivePool2d(pool_type="avg", flatten=True)),
    "before pooling to a map and a convolution": seq(
        norm(), nn.AvgPool2d(3, 2), nn.AdaptiveAvgPool2d((2, 3)), conv(4, 5, 1)
    ),
    "before a mean": Function(lambda m, x: m.b(m.a(x).mean((-2, -1))), norm(), nn.Linear(4, 3)),
    "before a kept mean": Function(
        lambda m, x: m.b(torch.mean(m.a(x), dim=(2, 3), keepdim=True)), norm(), conv(4, 3, 1)
    ),
    "before functions": Function(
        lambda m, x: m.b(
            F.dropout(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1), 0.5, training=m.training)
        ),
        norm(),
        nn.Linear(4, 3),
    ),
    "shared by levels of a pyramid": Function(levels, conv(padding=1), norm()),
    "inside a part that can be traced": Function(
        lambda m, x: m.a(x) if x.mean() < 5 else x, seq(conv(), norm())
    ),
    "beside a part that cannot be traced": seq(
        conv(padding=1), norm(), Function(lambda m, x: m.a(x) if x.mean() < 5 else x, nn.ReLU())
    ),
}


@pytest.mark.parametrize("position", FOLDED)
def test_folded(position):
    model = randomize(copy.deepcopy(FOLDED[position])).double()
    fused = fuse(model)
    assert count(fused, *NORMS) == 0
    assert unfused(model) == {}
    assert compare(model, fused, IMAGE).relative <= 1e-12
    assert compare(model, fuse(fused), IMAGE).relative <= 1e-12


def twice(m, x):
    return m.c(m.b(m.a(x))) + m.b(m.a(m.c(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(padding=1), norm(), conv(padding=1)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Alias(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = conv(), norm()
        self.alias = self.norm

    def forward(self, x):
        return self.alias(self.layer(x))


class Subclass(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def overwrite(m, x):
    x = x + 1
    y = m.a(x)
    x.relu_()
    return m.b(y) + x


KEPT = {
    "a padded convolution follows": (seq(norm(), conv(padding=1)), "1 pads what it normalises"),
    "an activation follows": (seq(norm(), nn.ReLU(), conv(4, 4, 1)), "consumer, 1, is no"),
    "two consumers": (
        Function(lambda m, x: m.b(y := m.a(x)) + m.c(y), norm(), conv(), conv()),
        "2 consumers",
    ),
    "the output is returned": (norm(), "no traced forward calls it"),
    "the output is returned too": (
        Function(lambda m, x: (y := m.a(x), m.b(y)), norm(), conv(4, 4, 1)),
        "2 consumers",
    ),
    "a feature": (Function(lambda m, x: [m.a(x)], norm()), "its output is returned"),
    "unnormalised too": (
        Function(lambda m, x: (y := m.a(x)) + m.b(y), conv(), norm()),
        "the output of a has other consumers",
    ),
    "called differently": (
        Function(twice, conv(padding=1), norm(), conv(4, 4, 1)),
        None,
    ),
    "shared layer": (
        Function(lambda m, x: m.b(m.a(x)) + m.a(x), conv(), norm()),
        "a and it are not always called together",
    ),
    "shared weight": (Tied(), "a or its parameters have a second name"),
    "second name": (Alias(), "norm or its parameters have a second name"),
    "weight used elsewhere": (
        Function(lambda m, x: m.b(m.a(x)) * m.a.weight.mean(), conv(), norm()),
        "the parameters of a are also used directly",
    ),
    "computed weight": (
        seq(nn.utils.parametrizations.weight_norm(conv()), norm()),
        "not the output of one convolution",
    ),
    "statistics of the batch": (seq(conv(), norm(track_running_stats=False)), "no running stat"),
    "unknown class": (seq(conv(), Subclass(4)), "unknown class"),
    "one dimension": (
        seq(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        "BatchNorm1d is not supported",
    ),
    "maximum": (head(nn.AdaptiveMaxPool2d(1), nn.Flatten()), "consumer, 1, is no"),
    "padded average": (
        seq(norm(), nn.AvgPool2d(3, padding=1), conv(4, 4, 1)),
        "consumer, 1, is no",
    ),
    "average over channels": (
        Function(lambda m, x: m.b(m.a(x).mean(1, keepdim=True)), norm(), conv(1, 4, 1)),
        "consumer, mean, is no",
    ),
    "a linear layer on columns": (seq(norm(9), nn.Linear(9, 3)), "consumer, 1, is no"),
    "all positions in the linear layer": (
        seq(norm(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
        "consumer, 3, is no",
    ),
    "activation of its own": (seq(BatchNormAct2d(4), conv(4, 4, 1)), "more than normalise"),
    "overwritten input": (Function(overwrite, norm(), conv(4, 4, 1)), "a tensor is overwritten"),
    "depends on values": (
        Function(lambda m, x: m.b(m.a(x)) if x.mean() < 5 else m.a(x), conv(), norm()),
        "no traced forward calls it",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_kept(case):
    model, reason = KEPT[case]
    model = randomize(copy.deepcopy(model)).double()
    image = IMAGE[:1].transpose(1, 2) if case == "a linear layer on columns" else IMAGE
    fused = fuse(model)
    if reason is not None:
        assert count(fused, *NORMS, nn.BatchNorm1d) == 1
        (why,) = unfused(model).values()
        assert reason in why
    assert compare(model, fused, image).difference <= 1e-12


@pytest.mark.parametrize(
    ("watched", "norms"), [("0", 1), ("1", 1), ("0.0", 1), ("1.0", 1), ("", 0)]
)
def test_what_a_hook_sees_stays_true(watched, norms):
    model = randomize(seq(seq(conv()), seq(norm()), nn.ReLU())).double()
    seen = []
    model.get_submodule(watched).register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    model(IMAGE)
    fused = fuse(model)
    assert count(fused, *NORMS) == norms
    fused(IMAGE)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-10, atol=1e-10)


def test_hooks_around_both_do_not_keep_the_norm():
    model = randomize(seq(seq(conv(), norm()), nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, output: None)
    assert unfused(model) == {}


def test_hook_between_norm_and_head_keeps_the_norm():
    model = randomize(head(seq(nn.AdaptiveAvgPool2d(1)), nn.Flatten()))
    model[1].register_forward_hook(lambda module, args, output: None)
    assert list(unfused(model)) == ["0"]


def test_optional_argument_keeps_its_default_meaning():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), norm()

        def forward(self, x, normalize=True, mask=None):
            x = self.b(self.a(x)) if normalize else self.a(x)
            return x if mask is None else x * mask

    model = randomize(Model()).double()
    assert count(fuse(model), *NORMS) == 0
    assert compare(model, fuse(model), IMAGE).relative <= 1e-12
    # As a part of a network that cannot be traced, who knows what is passed.
    outer = Function(lambda m, x: m.a(x, x.mean() > 5), model)
    assert list(unfused(outer)) == ["a.b"]
    assert compare(outer, fuse(outer), IMAGE).difference == 0


def test_input_is_untouched():
    model = randomize(networks()["dilated"]).train()
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    assert model.training
    assert not any(module.training for module in fused.modules())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_keeps_dtype_device_layout_and_frozen_parameters():
    model = seq(conv(bias=False), norm(), conv(4, 4, 1)).to(torch.float16)
    model[0].requires_grad_(False).to(memory_format=torch.channels_last)
    first, _, last = fuse(model)
    assert {p.dtype for p in (*first.parameters(), *last.parameters())} == {torch.float16}
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for p in last.parameters())
    assert {p.device.type for p in fuse(seq(conv(), norm()).to("meta")).parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_networks_of_timm_lose_all_norms(name):
    model = randomize(create_timm_model(name)).double()
    fused = fuse(model)
    assert count(fused, *NORMS) == 0
    assert compare(model, fused, torch.randn(2, 3, 64, 64).double()).relative <= 1e-10


@pytest.mark.parametrize("convert", [nn.Identity(), nn.SyncBatchNorm.convert_sync_batchnorm])
@pytest.mark.parametrize("small_kernel", [5, None])
def test_replknet_loses_all_norms(small_kernel, convert):
    model = convert(randomize(create_model("replknet_nano", small_kernel=small_kernel))).double()
    fused = fuse(model)
    assert count(fused, *NORMS) == 0
    assert compare(model, fused, torch.randn(2, 3, 32, 32).double()).relative <= 1e-10


def test_norms_of_features_stay():
    model = create_model("replknet_nano", features_only=True, norm_intermediate_features=True)
    model = randomize(model).double()
    fused = fuse(model)
    result = compare(model, fused, torch.randn(2, 3, 32, 32).double())
    assert result.relative <= 1e-10
    remaining = unfused(model)
    assert [name for name in remaining if name.endswith("stages.0.norm")]
    assert len(remaining) == count(fused, *NORMS) == 3
    assert all("its output is returned" in why for why in remaining.values())


def test_pooled_features_keep_the_last_norm():
    model = randomize(create_model("replknet_nano", num_classes=0)).double()
    fused = fuse(model)
    assert list(unfused(model)) == ["norm"]
    assert compare(model, fused, torch.randn(2, 3, 32, 32).double()).relative <= 1e-10

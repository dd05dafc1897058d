from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replknet.analysis.flops import (
    CLASSIFICATION,
    DENSE_PREDICTION,
    MMPRETRAIN,
    count_flops,
    count_operations,
)
from replknet.deploy import fuse, reparameterize
from replknet.models import create_model


def build(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.mark.parametrize(("size", "flops"), [(224, 15_636_547_584), (384, 45_952_303_104)])
def test_counts_of_mmpretrain_to_the_digit(size, flops):
    model = build("replknet_31b", form=MMPRETRAIN.form)
    assert count_flops(model, (1, 3, size, size), MMPRETRAIN) == flops


@pytest.mark.parametrize(
    ("name", "size", "flops", "parameters"),
    [
        ("replknet_31b", 224, "15.354", "79.44"),
        ("replknet_31b", 384, "45.119", "79.44"),
        ("replknet_31l", 384, "95.989", "172.03"),
        ("replknet_xl", 320, "128.730", "335.21"),
    ],
)
def test_columns_of_table_6(name, size, flops, parameters):
    model = build(name, form=CLASSIFICATION.form)
    assert f"{count_flops(model, (1, 3, size, size)) / 1e9:.3f}" == flops
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == parameters


def test_backbone_of_a_dense_prediction_row():
    model = build("replknet_31b", features_only=True, form=DENSE_PREDICTION.form)
    operations = count_operations(model, torch.empty(1, 3, 64, 64))
    assert "batch_norm" in operations  # in front of the blocks, and not counted
    positions = {kind: operations[kind] for kind in ("convolution_bias", "relu")}
    # Outputs of the convolutions: stem, then each stage's blocks, then each transition.
    stem = (32**2 * 3 + 16**2) * 128
    pairs = [(2, 16, 128), (2, 8, 256), (18, 4, 512), (2, 2, 1024)]
    blocks = sum(layers * size**2 * width * (3 + 4 + 1) for layers, size, width in pairs)
    steps = [(16, 8, 256), (8, 4, 512), (4, 2, 1024)]
    transitions = sum((before**2 + after**2) * width for before, after, width in steps)
    assert positions["convolution_bias"] == stem + blocks + transitions
    in_blocks = sum(layers * size**2 * width * 2 for layers, size, width in pairs)
    assert positions["relu"] == stem + in_blocks + transitions
    total = DENSE_PREDICTION.total(operations)
    assert total == operations["convolution"] + sum(positions.values())


def test_kinds_by_hand():
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, (3, 5), stride=2, padding=(1, 2))
            self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False)
            self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
            self.bn, self.gn = nn.BatchNorm2d(6), nn.GroupNorm(2, 6)
            self.ln = nn.LayerNorm(6)
            self.attention = nn.Linear(6, 6, bias=False)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            x = F.max_pool2d(self.up(F.relu(self.grouped(self.convolution(x)))), 2)
            x = F.relu(F.gelu(self.gn(self.bn(x))), inplace=True)
            tokens = self.ln(x.flatten(2).transpose(1, 2))
            weights = (self.attention(tokens) @ tokens.transpose(1, 2)).softmax(-1)
            return self.head((weights @ tokens).mean(1))

    operations = count_operations(Everything(), torch.randn(2, 3, 8, 16))
    # Maps: 8x16 -> 4x8 -> (up) 8x16 -> (pool) 4x8, so 32 tokens.
    assert operations == {
        "convolution": 2 * 32 * (4 * 3 * 15 + 8 * 9),
        "convolution_bias": 2 * 32 * 4,
        "deconvolution": 2 * 32 * 8 * 6 * 4,
        "deconvolution_bias": 2 * 128 * 6,
        "pool": 2 * 128 * 6 + 2 * 32 * 6,
        "batch_norm": 2 * 32 * 6,
        "group_norm": 2 * 32 * 6,
        "layer_norm": 2 * 32 * 6,
        "gelu": 2 * 32 * 6,
        "relu": 2 * 32 * 8 + 2 * 32 * 6,
        "linear": 2 * 32 * 36 + 2 * 30,
        "linear_bias": 2 * 5,
        "matmul": 2 * 2 * 32 * 32 * 6,
        "softmax": 2 * 32 * 32,
    }


def test_own_operator_counts_as_a_convolution():
    network = create_model("replknet_nano", num_classes=3)
    stock = create_model("replknet_nano", num_classes=3)
    for name, module in list(stock.named_modules()):
        if isinstance(module, nn.Conv2d):
            plain = nn.Conv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                groups=module.groups,
                bias=module.bias is not None,
            )
            stock.set_submodule(name, plain)
    image = torch.empty(2, 3, 32, 32)
    assert count_operations(network, image) == count_operations(stock, image)


def test_counting_leaves_the_model_alone():
    model = create_model("replknet_nano").train()
    weight = model.head.weight
    before = weight.detach().clone()
    assert count_flops(model, (1, 3, 32, 32)) > 0
    assert model.training
    assert model.head.weight is weight
    assert torch.equal(weight, before)


def test_merging_and_fusing_save_what_they_should():
    model = create_model("replknet_nano")
    merged, size = reparameterize(model), (1, 3, 32, 32)
    small = [(1, 16, 48), (2, 8, 96), (1, 4, 192)]
    saved = sum(layers * side**2 * width * 25 for layers, side, width in small)
    assert count_flops(model, size) - count_flops(merged, size) == saved
    assert count_flops(fuse(merged), size) == count_flops(merged, size)
    built = build("replknet_nano", form="deep_fused")
    assert count_flops(built, size) == count_flops(merged, size)

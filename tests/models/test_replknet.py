"""The network: published sizes and names, blocks, checkpointing, freezing."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from layouts import randomize, small
from torch import nn

from replknet.models import create_model, list_models

PUBLISHED = {
    "replknet_31b": (79_864_168, 79_527_272, 1171, 931),
    "replknet_31l": (172_671_016, 172_165_672, 1171, 931),
    "replknet_xl": (335_435_752, 335_399_656, 1027, 931),
}


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **kwargs)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_the_published_models(name):
    training, merged = on_meta(name), on_meta(name, form="merged")
    found = (
        parameters(training),
        parameters(merged),
        len(training.state_dict()),
        len(merged.state_dict()),
    )
    assert found == PUBLISHED[name]


def test_names_of_the_published_checkpoints():
    unit = r"(conv\.weight|bn\.(weight|bias|running_mean|running_var|num_batches_tracked))"
    bn = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    pattern = re.compile(
        rf"stem\.[0-3]\.{unit}|transitions\.[0-2]\.[01]\.{unit}|norm\.{bn}|head\.(weight|bias)"
        rf"|stages\.[0-3]\.blocks\.\d*[02468]\.(prelkb_bn\.{bn}|(pw1|pw2)\.{unit}"
        rf"|large_kernel\.(lkb_origin|small_conv)\.{unit})"
        rf"|stages\.[0-3]\.blocks\.\d*[13579]\.(preffn_bn\.{bn}|(pw1|pw2)\.{unit})"
    )
    names = on_meta("replknet_31b").state_dict()
    assert [name for name in names if not pattern.fullmatch(name)] == []


def test_names_of_the_other_forms():
    merged = set(small(form="merged").state_dict())
    assert "stages.0.blocks.0.large_kernel.lkb_reparam.bias" in merged
    assert not any("lkb_origin" in name or "small_conv" in name for name in merged)
    deep_fused = set(small(form="deep_fused").state_dict())
    norms = {name.rsplit(".", 1)[0] for name in deep_fused if "running_mean" in name}
    assert norms == {
        "norm",
        *(f"stages.{s}.blocks.{b}.prelkb_bn" for s, b in ((0, 0), (1, 0), (1, 2))),
        *(f"stages.{s}.blocks.{b}.preffn_bn" for s, b in ((0, 1), (1, 1), (1, 3))),
    }
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small(form="fused").modules())


def test_fused_form_keeps_norms_that_nothing_can_absorb():
    headless = small(form="fused", num_classes=0)
    assert isinstance(headless.norm, nn.BatchNorm2d)
    dense = small(form="fused", norm_intermediate_features=True)
    assert [isinstance(s.norm, nn.BatchNorm2d) for s in dense.stages] == [True, True]


@pytest.mark.parametrize(("stem_stride", "size"), [(4, 4), (2, 8), (1, 16)])
def test_stem_stride(stem_stride, size):
    model = small(stem_stride=stem_stride, in_chans=1).eval()
    features = model.forward_intermediates(torch.randn(1, 1, 32, 32), intermediates_only=True)
    assert [f.shape[-1] for f in features] == [32 // stem_stride, 16 // stem_stride]
    assert [i["reduction"] for i in model.feature_info] == [stem_stride, 2 * stem_stride]
    assert features[1].shape[-1] == size


def test_drop_path_grows_linearly_over_pairs():
    model = small(layers=(2, 3), drop_path_rate=0.4)
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0)
        for stage in model.stages
        for block in stage.blocks
    ]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_block_follows_the_paper():
    torch.manual_seed(0)
    model = small(channels=(6, 8), dw_ratio=1.5).double().eval()
    randomize(model)
    block, ffn = model.stages[0].blocks
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    relu = torch.relu
    out = relu(block.pw1.bn(block.pw1.conv(block.prelkb_bn(x))))
    large, little = block.large_kernel.lkb_origin, block.large_kernel.small_conv
    out = relu(
        large.bn(dense_depthwise(out, large.conv.weight))
        + little.bn(dense_depthwise(out, little.conv.weight))
    )
    out = x + block.pw2.bn(block.pw2.conv(out))
    torch.testing.assert_close(block(x), out, rtol=1e-10, atol=1e-10)
    hidden = ffn.pw1.bn(ffn.pw1.conv(ffn.preffn_bn(x)))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = x + ffn.pw2.bn(ffn.pw2.conv(hidden))
    torch.testing.assert_close(ffn(x), expected, rtol=1e-10, atol=1e-10)


def dense_depthwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Depthwise convolution as sums of shifted products."""
    reach = weight.shape[-1] // 2
    padded = nn.functional.pad(x, [reach] * 4)
    height, width = x.shape[-2:]
    return sum(
        padded[:, :, i : i + height, j : j + width] * weight[:, :, i, j].reshape(1, -1, 1, 1)
        for i in range(weight.shape[-2])
        for j in range(weight.shape[-1])
    )


def test_gradient_checkpointing_changes_nothing_but_memory():
    torch.manual_seed(0)
    plain = small(drop_path_rate=0.5).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(4, 3, 24, 24)
    for model in (plain, saving):
        torch.manual_seed(1)
        model(x).square().sum().backward()
    for (name, ours), theirs in zip(
        saving.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    assert plain.norm.num_batches_tracked == 1


def test_gradient_checkpointing_recomputes():
    model = small().train()
    model.set_grad_checkpointing()
    calls = []
    block = model.stages[0].blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert len(calls) == 2
    assert block.prelkb_bn.momentum == 0.1
    assert block.prelkb_bn.num_batches_tracked == 1


def test_frozen_stages_stay_as_they_are():
    model = small(frozen_stages=1, layers=(1, 1), num_classes=2).train()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("stem.", "stages.0"))}
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    same = {n for n in before if torch.equal(before[n], after[n])}
    assert {n for n in before if n.startswith(("stem.", "stages.0."))} <= same
    assert not any(n.startswith("transitions.0") and n.endswith("conv.weight") for n in same)


def test_everything_frozen_leaves_only_the_head():
    model = small(frozen_stages=2)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"norm", "head"}


def test_channels_last_gives_the_same_result():
    torch.manual_seed(0)
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    actual = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernels": (30, 7)}, r"must be odd.*got 30; use 29 or 31"),
        ({"small_kernel": 4}, r"small_kernel must be odd.*got 4"),
        ({"kernels": (13, 5)}, r"small_kernel \(5\) must be smaller than the large kernel \(5\)"),
        ({"kernels": (13,)}, r"one entry for each stage.*\(13,\), \(1, 2\)"),
        ({"layers": (), "kernels": (), "channels": ()}, r"one entry for each stage"),
        ({"stem_stride": 3}, r"1, 2 or 4, got 3"),
        ({"frozen_stages": 3}, r"between -1 .* and 2 .*got 3"),
        ({"form": "melted"}, r"training, merged, deep_fused, fused, got 'melted'"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_small_variants_have_about_the_size_they_promise():
    assert 25e6 < parameters(on_meta("replknet_31t")) < 32e6
    assert 0.3e6 < parameters(on_meta("replknet_nano")) < 1.5e6


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"no model 'replknet_31bb'; did you mean replknet_31b"):
        create_model("replknet_31bb")


def test_arguments_that_there_are_not():
    with pytest.raises(ValueError, match=r"cannot be built with drop_path=0.1: .*drop_path"):
        create_model("replknet_nano", drop_path=0.1)


def test_list_models():
    assert {"replknet_31b", "replknet_nano", "replknet_31t", *PUBLISHED} <= set(list_models())

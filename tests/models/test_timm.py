"""The contract of timm, over every registered variant."""

from __future__ import annotations

import argparse
import copy

import pytest
import timm
import torch
from layouts import HEADS, LAYOUTS, prefixed, randomize, small, without_classifier
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import replknet

VARIANTS = replknet.list_models()
SHORT = {name: (1, 1, 1) if name == "replknet_nano" else (1, 1, 1, 1) for name in VARIANTS}
SIZE = 64


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="meta")


def test_registered_with_timm():
    assert set(VARIANTS) <= set(timm.list_models("replknet*"))
    assert timm.list_models("replknet*", pretrained=True) == []


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_classifier(name):
    model = on_meta(name, num_classes=11, in_chans=2, layers=SHORT[name])
    assert (model.num_classes, model.in_chans) == (11, 2)
    assert model(images(2, 2, SIZE, SIZE)).shape == (2, 11)
    features = model.forward_features(images(2, 2, SIZE, SIZE))
    assert features.shape[:2] == (2, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model(images(2, 2, SIZE, SIZE)).shape == (2, 3)
    model.reset_classifier(0, "max")
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.global_pool.pool_type == "max"
    model.reset_classifier(0, "")
    assert model(images(2, 2, SIZE, SIZE)).shape == features.shape


@pytest.mark.parametrize("name", VARIANTS)
def test_default_config(name):
    model = on_meta(name)
    config = model.pretrained_cfg
    assert model.get_submodule(config["first_conv"]).in_channels == 3
    assert model.get_submodule(config["classifier"]).out_features == config["num_classes"]
    assert timm.data.resolve_data_config(model=model)["interpolation"] == "bicubic"
    reduction = model.feature_info[-1]["reduction"]
    assert config["pool_size"] == tuple(side // reduction for side in config["input_size"][1:])


@pytest.mark.parametrize("name", VARIANTS)
def test_features_only(name):
    model = on_meta(name, features_only=True, layers=SHORT[name])
    outputs = model(images(1, 3, SIZE, SIZE))
    assert [f.shape[1] for f in outputs] == model.feature_info.channels()
    assert [SIZE // f.shape[2] for f in outputs] == model.feature_info.reduction()
    model = on_meta(name, features_only=True, out_indices=(0, -2), layers=SHORT[name])
    assert len(model(images(1, 3, SIZE, SIZE))) == 2
    kept = len(model.model.stages)
    assert kept == len(SHORT[name]) - 1
    assert len(model.model.transitions) == kept - 1


def test_forward_intermediates():
    torch.manual_seed(0)
    model = randomize(small()).eval()
    x = torch.randn(2, 3, 32, 32)
    final, features = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [tuple(f.shape) for f in features] == [(2, 8, 16, 16), (2, 16, 8, 8)]
    torch.testing.assert_close(model.norm(features[-1]), final)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[0], features[0])
    torch.testing.assert_close(normed[1], final)
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    torch.testing.assert_close(last, features[1])
    early, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
    torch.testing.assert_close(first, features[0])
    torch.testing.assert_close(early, features[0])
    whole, _ = model.forward_intermediates(x, indices=[0])
    torch.testing.assert_close(whole, final)
    with pytest.raises(NotImplementedError, match="'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_forward_intermediates_with_norms_of_their_own():
    torch.manual_seed(0)
    model = randomize(small(norm_intermediate_features=True)).eval()
    x = torch.randn(1, 3, 32, 32)
    final, features = model.forward_intermediates(x)
    plain = small()
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if ".norm." not in n})
    expected_final, raw = plain.eval().forward_intermediates(x)
    torch.testing.assert_close(final, expected_final)
    for stage, ours, theirs in zip(model.stages, features, raw, strict=True):
        torch.testing.assert_close(ours, stage.norm(theirs))


@pytest.mark.parametrize(("indices", "kept", "width"), [(1, 2, 16), ([0], 1, 8), (None, 2, 16)])
def test_prune_intermediate_layers(indices, kept, width):
    model = small().eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices, prune_norm=True)
    assert (len(model.stages), len(model.transitions)) == (kept, kept - 1)
    assert model.num_features == width
    assert isinstance(model.norm, nn.Identity)
    found = model.forward_intermediates(x, indices=taken, intermediates_only=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_layer_decay_has_the_fourteen_groups_of_the_recipes():
    model = on_meta("replknet_31b", norm_intermediate_features=True)
    expected = {}
    for name, _ in model.named_parameters():
        part, *rest = name.split(".")
        if part == "stem":
            group = 0
        elif part in ("stages", "transitions") and rest[0] in "01":
            group = int(rest[0]) + 1
        elif part == "stages" and rest[0] == "2" and rest[1] == "blocks":
            group = 3 + int(rest[2]) // 4
        elif part in ("stages", "transitions") and rest[0] == "2":
            group = 11
        elif part == "stages":
            group = 12
        else:
            group = 13
        expected[name] = group
    found = group_parameters(model, model.group_matcher(), reverse=True)
    assert found == expected
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales == pytest.approx([0.7 ** (13 - i) for i in range(14)])


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_groups_follow_the_depth(name):
    model = on_meta(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert groups["stem.0.conv.weight"] == 0
        assert groups["head.weight"] == groups["norm.weight"] == max(groups.values())
        assert sorted(set(groups.values())) == list(range(max(groups.values()) + 1))
        stages = len(model.stages)
        last = f"stages.{stages - 1}.blocks.0.prelkb_bn.weight"
        assert groups["stages.0.blocks.0.prelkb_bn.weight"] == 1 <= groups[last]
        if coarse:
            assert max(groups.values()) == stages + 1


def test_reparameterize_model():
    torch.manual_seed(0)
    model = randomize(small()).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    merged = timm.utils.reparameterize_model(model)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-10, atol=1e-10)
    assert merged.state_dict().keys() == small(form="merged").state_dict().keys()
    again = timm.utils.reparameterize_model(merged)
    torch.testing.assert_close(again(x), merged(x), rtol=0, atol=0)
    assert "lkb_origin" in str(model)


def test_no_small_kernel_merges_too():
    model = randomize(small(small_kernel=None)).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    merged = timm.utils.reparameterize_model(model)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-10, atol=1e-10)


NANO = {"kernels": (13, 7), "layers": (1, 2), "channels": (8, 16)}


def load_through_timm(path, **kwargs) -> nn.Module:
    overlay = {"file": str(path), "num_classes": 5}
    return timm.create_model(
        "replknet_nano", pretrained=True, pretrained_cfg_overlay=overlay, **{**NANO, **kwargs}
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_local_file_through_timm(write, layout):
    state = randomize(small()).state_dict()
    model = load_through_timm(write(LAYOUTS[layout](state)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("form", ["merged", "deep_fused", "fused"])
def test_local_file_of_another_form_through_timm(write, form):
    state = small(form=form).state_dict()
    path = write({"model": state, "args": argparse.Namespace()})
    model = load_through_timm(path, form=form)
    assert torch.equal(model.state_dict()["head.weight"], state["head.weight"])
    with pytest.raises(ValueError, match=f"the file holds the {form} form.*form='{form}'"):
        load_through_timm(path)


def test_local_file_as_features_of_other_channels_through_timm(write):
    source = randomize(small()).eval()
    path = write(
        {"state_dict": {**prefixed("backbone.", without_classifier(source.state_dict())), **HEADS}}
    )
    model = load_through_timm(path, features_only=True, in_chans=1).eval()
    x = torch.randn(1, 1, 32, 32)
    expected = source.forward_intermediates(x.expand(1, 3, 32, 32), intermediates_only=True)
    for ours, theirs in zip(model(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_another_number_of_classes_through_timm(write):
    source = small()
    model = load_through_timm(write(source.state_dict()), num_classes=3)
    assert model.head.out_features == 3
    assert torch.equal(model.stem[0].conv.weight, source.stem[0].conv.weight)


def test_copies_and_trains_in_bfloat16():
    model = copy.deepcopy(small()).to(torch.bfloat16)
    model(torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

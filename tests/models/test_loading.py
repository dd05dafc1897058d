"""Every layout of a file loads completely, or is refused with cause and way out."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from layouts import HEADS, LAYOUTS, prefixed, randomize, small, without_classifier
from safetensors import safe_open
from torch import nn

from replknet.models import (
    create_model,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

FORMS = ("training", "merged", "deep_fused", "fused")


def assert_same(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_every_form(write, layout, form):
    state = randomize(small(form=form)).state_dict()
    model = small(form=form)
    report = load_checkpoint(model, write(LAYOUTS[layout](state)))
    assert_same(model, state)
    assert (report.form, report.num_classes) == (form, 5)
    assert (report.ignored, report.initialized, report.adapted) == ((), (), ())


@pytest.mark.parametrize("small_kernel", [5, None])
def test_deep_fused_before_it_was_merged(write, small_kernel):
    torch.manual_seed(0)
    source = randomize(small(small_kernel=small_kernel)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = source(x)
    for module in source.modules():
        if isinstance(module, nn.Sequential) and hasattr(module, "bn"):
            fused = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            module.conv, module.bn = fused, nn.Identity()
    model = small(form="deep_fused").double().eval()
    report = load_checkpoint(model, write(source.state_dict()))
    assert report.renamed == ("lkb_origin + small_conv -> lkb_reparam",)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_report_says_what_was_found(write):
    state = small().state_dict()
    text = str(load_checkpoint(small(), write(LAYOUTS["trainer"](state))))
    assert "trainer file, 'model_ema'" in text
    assert "averaged (EMA)" in text
    text = str(load_checkpoint(small(), write(LAYOUTS["mmpretrain"](state))))
    assert "names begin with 'backbone.'" in text
    assert "head.fc -> head; stages.1.norm -> norm" in text
    text = str(load_checkpoint(small(), write(LAYOUTS["22k"](state))))
    assert "head.cls_22k -> head" in text
    assert "classes: 5" in text


def test_choice_of_averaged_weights(write):
    state = randomize(small()).state_dict()
    path = write(LAYOUTS["trainer"](state))
    model = small()
    assert load_checkpoint(model, path).ema
    assert_same(model, state)
    assert not load_checkpoint(model, path, use_ema=False).ema
    assert all(not value.any() for value in model.state_dict().values())
    with pytest.raises(ValueError, match=r"no averaged \(EMA\) weights; pass use_ema=False"):
        load_checkpoint(model, write({"model": state}), use_ema=True)
    with pytest.raises(ValueError, match=r"only averaged weights \('model_ema'\)"):
        load_checkpoint(model, write({"model_ema": state}), use_ema=False)


def test_backbone_out_of_a_dense_prediction_file(write):
    source = randomize(small(norm_intermediate_features=True)).eval()
    state = prefixed("backbone.", without_classifier(source.state_dict()))
    path = write({"meta": {"CLASSES": ("road",)}, "state_dict": {**state, **HEADS}})
    features = create_model(
        "replknet_nano",
        checkpoint=path,
        features_only=True,
        kernels=(13, 7),
        layers=(1, 2),
        channels=(8, 16),
        out_indices=(0, 1),
    ).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = source.forward_intermediates(x, intermediates_only=True)
    for ours, theirs in zip(features(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    report = load_checkpoint(features, path)
    assert set(report.ignored) == set(HEADS)
    assert "decode_head (1 tensors), neck (1 tensors)" in str(report)


def test_features_of_fewer_stages_leave_the_rest_unused(write):
    path = write(small().state_dict())
    features = create_model(
        "replknet_nano", checkpoint=path, features_only=True, out_indices=(0,), **SMALL
    )
    report = load_checkpoint(features, path)
    assert {name.split(".")[0] for name in report.ignored} == {
        "head",
        "norm",
        "stages",
        "transitions",
    }
    with pytest.raises(ValueError, match=r"layers \(1, 2\) \(model: \(1, 1\)\)"):
        load_checkpoint(
            timm.create_model(
                "replknet_nano",
                features_only=True,
                out_indices=(0, 1),
                **SMALL | {"layers": (1, 1)},
            ),
            path,
        )


SMALL = {"kernels": (13, 7), "layers": (1, 2), "channels": (8, 16)}


def test_features_norms_that_the_file_lacks_stay_initialised(write):
    path = write(randomize(small()).state_dict())
    model = small(norm_intermediate_features=True)
    report = load_checkpoint(model, path)
    assert {n.rsplit(".", 1)[0] for n in report.initialized} == {"stages.0.norm", "stages.1.norm"}
    assert "left as initialised: stages (10 tensors)" in str(report)


def test_model_without_classifier_leaves_that_of_the_file(write):
    model = small(num_classes=0)
    report = load_checkpoint(model, write(small().state_dict()))
    assert set(report.ignored) == {"head.weight", "head.bias"}


def test_reset_head_keeps_the_new_classifier(write):
    source = randomize(small())
    model = small(num_classes=3)
    head = copy.deepcopy(model.head.state_dict())
    report = load_checkpoint(model, write(source.state_dict()), reset_head=True)
    assert set(report.initialized) == {"head.weight", "head.bias"}
    assert_same(model.head, head)
    assert torch.equal(model.norm.running_mean, source.norm.running_mean)
    backbone = write(without_classifier(source.state_dict()))
    report = load_checkpoint(model, backbone, reset_head=True)
    assert {name.split(".")[0] for name in report.initialized} == {"head", "norm"}


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "deit_tiny_distilled_patch16_224"]
)
def test_reset_head_of_other_models_keeps_their_new_classifiers(write, name):
    torch.manual_seed(0)
    source, target = (timm.create_model(name, num_classes=classes) for classes in (5, 3))
    before = copy.deepcopy(target.state_dict())
    path = write(source.state_dict())
    with pytest.raises(ValueError, match=r"another classifier; pass reset_head=True"):
        load_checkpoint(target, path)
    report = load_checkpoint(target, path, reset_head=True)
    heads = {n for n, value in before.items() if value.shape != source.state_dict()[n].shape}
    assert heads
    assert set(report.initialized) == set(report.ignored) == heads
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name] if name in heads else source.state_dict()[name])


def test_reset_head_of_a_model_that_names_no_classifier(write):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"get_classifier.*Linear does not.*without reset_head"):
        load_checkpoint(model, write(model.state_dict()), reset_head=True)


def test_input_channels_are_adapted(write):
    source = small()
    model = small(in_chans=1)
    report = load_checkpoint(model, write(source.state_dict()))
    assert report.adapted == ("input channels 3 -> 1",)
    torch.testing.assert_close(
        model.stem[0].conv.weight, source.stem[0].conv.weight.sum(1, keepdim=True)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 7}, r"file has 5 classes, the model 7.*num_classes=5.*reset_head=True"),
        ({"form": "merged"}, r"training form, the model has the merged form; build.*'training'"),
        ({"channels": (8, 24)}, r"another network: channels \(8, 16\) \(model: \(8, 24\)\)"),
        ({"layers": (1, 3)}, r"missing: stages.1.blocks.4.*\n  \.\.\. and \d+ more"),
        ({"small_kernel": None}, r"small_kernel 5 \(model: None\)"),
        ({"kernels": (15, 7)}, r"shape of .*: \(8, 1, 13, 13\) in the file, \(8, 1, 15, 15\)"),
    ],
)
def test_file_of_another_model(write, arguments, message):
    model = small(**arguments)
    before = copy.deepcopy(model.state_dict())
    path = write(small().state_dict())
    with pytest.raises(ValueError, match=f"(?s){path} does not fit the model.*{message}"):
        load_checkpoint(model, path)
    assert_same(model, before)


def test_backbone_does_not_make_a_classifier(write):
    path = write(without_classifier(small().state_dict()))
    for model in (small(), small(num_classes=0)):
        with pytest.raises(ValueError, match=r"backbone without classifier.*features_only=True"):
            load_checkpoint(model, path)


def test_stage_norms_need_a_place(write):
    path = write(small(norm_intermediate_features=True).state_dict())
    with pytest.raises(ValueError, match="pass norm_intermediate_features=True"):
        load_checkpoint(small(), path)


def test_misspelt_name_comes_with_the_nearest(write):
    state = small().state_dict()
    state["stages.0.blocks.0.prelkb_bn.wieght"] = state.pop("stages.0.blocks.0.prelkb_bn.weight")
    with pytest.raises(ValueError, match=r"prelkb_bn.weight \(nearest: .*prelkb_bn.wieght\)"):
        load_checkpoint(small(), write(state))


def test_incomplete_file(write):
    state = {n: v for n, v in small().state_dict().items() if n.startswith("stem.")}
    with pytest.raises(ValueError, match=r"file.pth: .*incomplete: stages.0.*is missing"):
        load_checkpoint(small(), write(state))


def test_file_of_another_family(write):
    path = write(timm.create_model("resnet10t").state_dict())
    with pytest.raises(
        ValueError, match=r"holds no RepLKNet.*tensors belong to conv1, bn1, layer1"
    ):
        load_checkpoint(small(), path)


def test_several_networks_in_one_file(write):
    state = small().state_dict()
    path = write({**prefixed("student.", state), **prefixed("teacher.", state)})
    with pytest.raises(ValueError, match=r"holds 2 RepLKNets: student.stem.*, teacher.stem"):
        load_checkpoint(small(), path)


def test_other_models_load_their_own_state_dict(write):
    source, target = (timm.create_model("test_convnext", num_classes=2) for _ in range(2))
    report = load_checkpoint(
        target, write({"state_dict": prefixed("module.", source.state_dict())})
    )
    assert_same(target, source.state_dict())
    assert report.form is None
    with pytest.raises(ValueError, match=r"does not fit the model test_convnext"):
        load_checkpoint(target, write(timm.create_model("test_resnet").state_dict()))


def test_our_file_carries_all_that_is_needed(write):
    torch.manual_seed(0)
    metadata = {
        "task": "classification",
        "model": {
            "name": "replknet_nano",
            "kwargs": {**SMALL, "in_chans": 1, "num_classes": 4, "stem_stride": 1},
        },
        "preprocessing": {
            "input_size": [1, 28, 28],
            "mean": [0.3],
            "std": [0.4],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
        "class_names": ["a", "b", "c", "d"],
        "metrics": {"top1": 0.5},
    }
    source = randomize(create_model("replknet_nano", **metadata["model"]["kwargs"])).eval()
    path = write(source.state_dict(), "best.safetensors", metadata)
    model = create_model(checkpoint=path).eval()
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(model(x), source(x))
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (1, 28, 28)
    assert (config["mean"], config["std"]) == ((0.3,), (0.4,))
    found = read_checkpoint(path).metadata
    assert {key: found[key] for key in metadata} == json.loads(json.dumps(metadata))
    assert found["form"] == "training"
    assert "metrics: {'top1': 0.5}" in str(load_checkpoint(model, path))
    changed = create_model("replknet_nano", checkpoint=path, num_classes=9, reset_head=True)
    assert changed.head.out_features == 9
    assert changed.stem[0].conv.in_channels == 1


@pytest.mark.parametrize("form", FORMS)
def test_create_model_builds_what_the_file_holds(write, form):
    source = randomize(create_model("replknet_nano", num_classes=3, form=form)).eval()
    path = write({"model": source.state_dict()})
    for model in (create_model(checkpoint=path), create_model("replknet_nano", checkpoint=path)):
        assert_same(model, source.state_dict())
    with pytest.raises(ValueError, match="another network: kernels"):
        create_model("replknet_7", checkpoint=path)


def test_create_model_of_no_known_variant(write):
    path = write(small().state_dict())
    with pytest.raises(ValueError, match=r"no known variant \(kernels \(13, 7\).*RepLKNet"):
        create_model(checkpoint=path)
    with pytest.raises(ValueError, match=r"name a model .* or give a checkpoint"):
        create_model()


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model = small()
    save_checkpoint(path, model, {"task": "classification"})
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("replknet.models.checkpoint.save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*model.safetensors.*No space left"):
        save_checkpoint(path, small(), {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["replknet"])["task"] == "classification"

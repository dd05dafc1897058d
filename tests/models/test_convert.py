"""Any format and form to any other that comes after it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from layouts import LAYOUTS as FOUND
from layouts import prefixed, randomize, small, without_classifier

from replknet.cli.main import main
from replknet.deploy.convert import FORMS, LAYOUTS, ConversionConfig, convert_checkpoint
from replknet.models import create_model, load_checkpoint, read_checkpoint


def convert(source, target, **options):
    return convert_checkpoint(ConversionConfig(source, target, **options))


@pytest.mark.parametrize("source", FOUND)
def test_every_layout_becomes_ours_and_back(write, tmp_path, source):
    state = randomize(small()).state_dict()
    ours = tmp_path / "ours.safetensors"
    convert(write(FOUND[source](state)), ours)
    assert read_checkpoint(ours).state_dict.keys() == state.keys()
    for layout in LAYOUTS:
        if layout == "backbone":
            continue
        theirs = tmp_path / f"{layout}.pth"
        convert(ours, theirs, layout=layout)
        model = small()
        assert load_checkpoint(model, theirs).form == "training"
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), (layout, name)


@pytest.mark.parametrize(("source", "target"), list(itertools.combinations(FORMS, 2)))
@pytest.mark.parametrize("small_kernel", [5, None])
def test_folding_keeps_the_function(write, tmp_path, source, target, small_kernel):
    torch.manual_seed(0)
    model = randomize(small(form=source, small_kernel=small_kernel)).eval()
    path = tmp_path / "folded.safetensors"
    conversion = convert(write(model.state_dict()), path, form=target)
    assert conversion.form == target
    folded = small(form=target).eval()
    assert load_checkpoint(folded, path).form == target
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-4 * expected.std().item())


@pytest.mark.parametrize(("target", "source"), list(itertools.combinations(FORMS, 2)))
def test_folding_cannot_be_undone(write, tmp_path, source, target):
    path = write(small(form=source).state_dict())
    with pytest.raises(ValueError, match=f"{source} form cannot be .* {target} .*that was trained"):
        convert(path, tmp_path / "x.safetensors", form=target)
    assert not (tmp_path / "x.safetensors").exists()


def test_dense_prediction_backbone(write, tmp_path):
    torch.manual_seed(0)
    source = randomize(small(norm_intermediate_features=True)).eval()
    path = write({"state_dict": prefixed("backbone.", without_classifier(source.state_dict()))})
    for form in ("merged", "deep_fused", "fused"):
        target = tmp_path / f"{form}.pth"
        convert(path, target, layout="backbone", form=form)
        features = create_model(
            "replknet_nano",
            checkpoint=target,
            features_only=True,
            kernels=(13, 7),
            layers=(1, 2),
            channels=(8, 16),
        ).eval()
        x = torch.randn(1, 3, 32, 32)
        expected = source.forward_intermediates(x, intermediates_only=True)
        for ours, theirs in zip(features(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_our_metadata_travels(write, tmp_path):
    metadata = {"task": "classification", "class_names": ["a", "b"]}
    source = write(small().state_dict(), "ours.safetensors", metadata)
    merged = tmp_path / "merged.safetensors"
    convert(source, merged, form="merged")
    found = read_checkpoint(merged).metadata
    assert (found["class_names"], found["form"]) == (["a", "b"], "merged")
    path = write(small().state_dict())
    assert "preprocessing: unknown" in str(convert(path, tmp_path / "of_unknown.safetensors"))
    assert "without: metadata" in str(convert(source, tmp_path / "bare.pth", layout="bare"))


def test_published_file_gets_its_preprocessing(write, tmp_path, monkeypatch):
    monkeypatch.setitem(
        create_model.__globals__["ARCHITECTURES"],
        "replknet_31b",
        {"kernels": (13, 7), "layers": (1, 2), "channels": (8, 16), "small_kernel": 5},
    )
    state = small().state_dict()
    path = write({"model": state}, "RepLKNet-31B_ImageNet-1K_384.pth")
    target = tmp_path / "ours.safetensors"
    assert "model: replknet_31b.in1k_384" in str(convert(path, target))
    metadata = read_checkpoint(target).metadata
    assert metadata["model"]["name"] == "replknet_31b.in1k_384"
    assert metadata["preprocessing"]["crop_mode"] == "squash"
    assert metadata["preprocessing"]["input_size"] == [3, 384, 384]
    model = create_model(checkpoint=target)
    assert model.pretrained_cfg["input_size"] == (3, 384, 384)
    convert(path, target, model="replknet_31b.in1k_224", overwrite=True)
    assert read_checkpoint(target).metadata["preprocessing"]["crop_pct"] == 0.875
    with pytest.raises(ValueError, match="is not replknet_xl: by its sizes it is replknet_31b"):
        convert(path, target, model="replknet_xl", overwrite=True)


@pytest.mark.parametrize(
    ("target", "layout", "message"),
    [
        ("x.pth", "safetensors", r"x.pth does not go with the layout safetensors"),
        ("x.safetensors", "bare", r"x.safetensors does not go with the layout bare"),
        ("x.pth", "tar", r"layout must be one of safetensors, bare, .*got 'tar'"),
    ],
)
def test_target_that_cannot_be(write, tmp_path, target, layout, message):
    with pytest.raises(ValueError, match=message):
        convert(write(small().state_dict()), tmp_path / target, layout=layout)


def test_layouts_that_lack_a_place(write, tmp_path):
    path = write(small(norm_intermediate_features=True).state_dict())
    with pytest.raises(ValueError, match="no place for both the final norm and stage norms"):
        convert(path, tmp_path / "x.pth", layout="mmpretrain")
    path = write(small(num_classes=0).state_dict())
    with pytest.raises(ValueError, match=r"no classifier, which this layout calls head.cls_22k"):
        convert(path, tmp_path / "x.pth", layout="22k")


def test_command(write, tmp_path, capsys):
    source = write(FOUND["trainer"](randomize(small()).state_dict()))
    target = tmp_path / "small.safetensors"
    words = ["convert", str(source), str(target), "--form", "merged"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["form"] == "merged"
    assert found["source"]["ema"] is True
    before = target.read_bytes()
    assert main(words) == 2
    assert "exists; overwrite it with --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--ema", "no"]) == 0
    assert f"-> {target}" in capsys.readouterr().out
    assert target.read_bytes() != before
    assert main(["convert", str(tmp_path / "nowhere.pth"), str(target), "--overwrite"]) == 2
    assert target.exists()

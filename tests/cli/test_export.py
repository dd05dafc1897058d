import json

import numpy as np
import pytest
from PIL import Image

from replknet.cli.main import main
from replknet.export import classifier, load_exported
from replknet.models import create_model, save_checkpoint
from replknet.tasks.classification import Preprocessing

SMALL = {"layers": (1, 1, 1), "channels": (8, 12, 16), "kernels": (9, 7, 5), "small_kernel": 3}
NAMES = ["ant", "bée", "[cat]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint and two photos."""
    root = tmp_path_factory.mktemp("export")
    kwargs = {"num_classes": 3, "in_chans": 1, **SMALL}
    metadata = {
        "task": "classification",
        "model": {"name": "replknet_nano", "kwargs": kwargs},
        "preprocessing": Preprocessing(28, (0.3,), (0.4,), crop_pct=1.0).to_dict(),
        "class_names": NAMES,
        "metrics": {"top1": 90.0},
    }
    save_checkpoint(root / "best.safetensors", create_model("replknet_nano", **kwargs), metadata)
    for name in "ab":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def exported(request, folder):
    """A file of each kind that can be predicted with."""
    path = folder / f"model.{'onnx' if request.param == 'onnx' else 'xml'}"
    words = ["export", str(folder / "best.safetensors"), "--format", request.param]
    assert main([*words, "--output", str(path)]) == 0
    return path


def predict(path, folder, capsys, *options):
    capsys.readouterr()
    assert main(["predict", str(path), str(folder), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_predictions_are_those_of_the_checkpoint(exported, folder, capsys):
    expected = predict(folder / "best.safetensors", folder, capsys)
    assert len(expected) == 2
    engines = ["openvino"] if exported.suffix == ".xml" else ["onnxruntime", "openvino"]
    for engine in engines:
        actual = predict(exported, folder, capsys, "--engine", engine)
        for mine, theirs in zip(actual, expected, strict=True):
            assert mine["source"] == theirs["source"]
            assert [la["name"] for la in mine["labels"]] == [la["name"] for la in theirs["labels"]]
            assert [la["probability"] for la in mine["labels"]] == pytest.approx(
                [la["probability"] for la in theirs["labels"]], abs=1e-5
            )


def test_the_file_carries_what_the_checkpoint_does(exported):
    engine = {".onnx": "onnxruntime", ".xml": "openvino"}[exported.suffix]
    loaded = load_exported(exported, engine, input_size=32)
    assert loaded.class_names == tuple(NAMES)
    assert loaded.preprocessing == Preprocessing(32, (0.3,), (0.4,), crop_pct=1.0)


def test_json_and_own_images(folder, capsys):
    words = ["export", str(folder / "best.safetensors"), "--format", "torch-export", "--json"]
    output = str(folder / "model.pt2")
    assert main([*words, "--output", output, "--images", str(folder)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["path"], report["format"]) == (output, "torch-export")
    assert report["checks"][0]["shape"] == [2, 1, 28, 28]
    assert report["relative"] <= 1e-4
    assert main([*words, "--output", output]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--output", output, "--overwrite", "--tolerance=-1"]) == 1
    assert "was not written" in capsys.readouterr().err


def test_files_that_cannot_be_run(exported, folder, tmp_path, capsys, monkeypatch):
    def error(*words):
        assert main(["predict", *map(str, words), str(folder)]) == 2
        return capsys.readouterr().err

    engine = {".onnx": "onnxruntime", ".xml": "openvino"}[exported.suffix]
    broken = tmp_path / exported.name
    assert "there is no file" in error(broken, "--engine", engine)
    broken.write_text("no model")
    assert f"{engine} cannot open" in error(broken, "--engine", engine)
    assert "runs" in error(folder / "best.safetensors", "--engine", engine)
    assert "are for checkpoints" in error(exported, "--engine", engine, "--device", "cuda")
    monkeypatch.setattr(classifier, "find_spec", lambda name: None)
    assert "pip install 'replknet[export]'" in error(exported, "--engine", engine)

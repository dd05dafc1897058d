import io
import json

import pytest
import torch
from PIL import Image

from replknet.cli.main import main
from replknet.models import create_model, save_checkpoint
from replknet.tasks.classification import Preprocessing

TINY = {"layers": (1, 1, 1), "channels": (8, 8, 8), "kernels": (5, 5, 5), "small_kernel": 3}


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    kwargs = {"num_classes": 3, **TINY}
    metadata = {
        "task": "classification",
        "model": {"name": "replknet_nano", "kwargs": kwargs},
        "preprocessing": Preprocessing(16, crop_pct=1.0).to_dict(),
        "class_names": ["ant", "bee", "[cat]"],
    }
    save_checkpoint(tmp_path / "m.safetensors", create_model("replknet_nano", **kwargs), metadata)
    return str(tmp_path / "m.safetensors")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (20, 16), "red").save(folder / name / "same.png")
    return folder


def test_lines(checkpoint, photos, capsys):
    assert main(["predict", checkpoint, str(photos), "--top-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{photos}/{n}/same.png" for n in "ab"]
    assert all(word in lines[0] for word in ("ant", "bee", "[cat]", "%"))


def test_json_on_stdout_with_a_list_on_stdin(checkpoint, photos, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos}/b/same.png\n{photos}/missing.png\n"))
    assert main(["predict", checkpoint, "-", "--json", "--top-k", "1"]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert good["source"] == f"{photos}/b/same.png"
    assert good["error"] is None
    [label] = good["labels"]
    assert label["name"] in ("ant", "bee", "[cat]")
    assert 1 / 3 <= label["probability"] <= 1
    assert (bad["source"], bad["labels"]) == (f"{photos}/missing.png", [])
    assert "FileNotFoundError" in bad["error"]


def test_json_of_nothing_and_into_a_file(checkpoint, photos, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["predict", checkpoint, "-", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    path = tmp_path / "result.json"
    assert main(["predict", checkpoint, str(photos), "--output", str(path)]) == 0
    assert len(json.loads(path.read_text())) == 2
    assert capsys.readouterr().out == ""


def test_overlays_of_files_with_one_name(checkpoint, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"")
    assert main(["predict", checkpoint, str(photos), "--overlays", str(tmp_path / "seen")]) == 1
    names = sorted(path.name for path in (tmp_path / "seen").iterdir())
    assert names == ["00001_same.png", "00002_same.png"]
    with Image.open(tmp_path / "seen" / names[0]) as drawing:
        assert drawing.getpixel((3, 3)) == (255, 0, 0)


def test_a_file_that_is_no_checkpoint_is_an_error(photos, capsys):
    assert main(["predict", str(photos / "a" / "same.png"), str(photos)]) == 2
    assert "same.png" in capsys.readouterr().err

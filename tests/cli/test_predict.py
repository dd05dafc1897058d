import io
import json
import os

import pytest
import torch
from PIL import Image

from replknet.cli.main import main
from replknet.models import create_model, save_checkpoint
from replknet.tasks.classification import Preprocessing
from replknet.tasks.classification.predict import Prediction

TINY = {"layers": (1, 1, 1), "channels": (8, 8, 8), "kernels": (5, 5, 5), "small_kernel": 3}


def save(path, change=lambda model: None):
    """Write a classifier and return the path as a word of the command line."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 3, **TINY}
    metadata = {
        "task": "classification",
        "model": {"name": "replknet_nano", "kwargs": kwargs},
        "preprocessing": Preprocessing(16, crop_pct=1.0).to_dict(),
        "class_names": ["ant", "bee", "[cat]"],
    }
    model = create_model("replknet_nano", **kwargs)
    change(model)
    save_checkpoint(path, model, metadata)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path / "m.safetensors")


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


def test_lines_show_names_as_they_are(checkpoint, photos, capsys):
    (photos / "a" / "same.png").rename(photos / ":cat: [old].png")
    (photos / ":dog: [red].png").write_bytes(b"")
    assert main(["predict", checkpoint, str(photos)]) == 1
    cat, dog = capsys.readouterr().out.splitlines()[:2]
    assert cat.startswith(f"{photos}/:cat: [old].png: ")
    assert dog.startswith(f"{photos}/:dog: [red].png: cannot be read: ")


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


def test_a_file_of_before_stays_until_the_new_one_is_complete(
    checkpoint, photos, capsys, monkeypatch, tmp_path
):
    path = tmp_path / "out" / "result.json"
    command = ["predict", checkpoint, str(photos), "--output", str(path)]
    assert main(command) == 2
    assert f"folder {path.parent} is missing" in capsys.readouterr().err
    path.parent.mkdir()
    path.write_text("before")
    assert main([*command, "--top-k", "0"]) == 2

    def interrupted(*_, **__):
        yield Prediction("a.png")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("replknet.cli.predict.predict", interrupted)
        assert main(command) == 130
    assert path.read_text() == "before"
    assert os.listdir(path.parent) == ["result.json"]
    assert main(command) == 0
    assert len(json.loads(path.read_text())) == 2


def test_json_into_a_pipe(checkpoint, photos, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert main(["predict", checkpoint, str(photos), "--output", str(pipe)]) == 0
        assert len(json.loads(os.read(reader, 65536))) == 2
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_probabilities_that_are_no_numbers_are_null(photos, capsys, tmp_path):
    broken = save(tmp_path / "nan.safetensors", lambda model: model.head.bias.data.fill_(torch.nan))
    command = ["predict", broken, str(photos), "--json", "--overlays", str(tmp_path / "seen")]
    assert main(command) == 0
    first, _ = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [label["probability"] for label in first["labels"]] == [None] * 3


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

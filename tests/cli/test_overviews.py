"""The commands that only look: models, tables, doctor."""

from __future__ import annotations

import json

import pytest

from replknet.analysis.catalog import Variant
from replknet.analysis.doctor import Finding
from replknet.analysis.tables import ClassificationFigures, ClassificationRow
from replknet.cli import doctor, models, tables
from replknet.cli.main import main

VARIANT = Variant(
    "replknet_31b.in1k_384",
    "published",
    (3, 384, 384),
    1000,
    79_864_168,
    79_438_952,
    45_118_578_688,
    "mit",
    "arXiv:2203.06717",
    "https://example.org",
    "file.pth",
)
ROW = ClassificationRow(
    "RepLKNet", "replknet_nano", 32, "ImageNet-22K", 83.5, 79, 15.3, 295.5, "test_resnet"
)
BASELINE = ClassificationRow("Swin", "test_resnet", 32, "ImageNet-22K", 83.5)
FIGURES = [
    ClassificationFigures(ROW, 79_438_952, 15_353_525_248, 1.306),
    ClassificationFigures(BASELINE, 1_000_000, 2_000_000_000, None),
]


def test_models(monkeypatch, capsys):
    monkeypatch.setattr(models, "list_variants", lambda: [VARIANT])
    assert main(["models"]) == 0
    assert " ".join(capsys.readouterr().out.split()).count(
        "replknet_31b.in1k_384 published MIT 384 1000 79.9 45.12"
    )
    assert main(["models", "--json"]) == 0
    (variant,) = json.loads(capsys.readouterr().out)
    assert variant["parameters"] == 79_864_168
    assert variant["input_size"] == [3, 384, 384]


def test_table_6(monkeypatch, capsys):
    monkeypatch.setattr(tables, "count_table_6", lambda: FIGURES)
    assert main(["tables", "6"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "RepLKNet 22K 32 83.5 79 79.44 15.3 15.354 295.5 1.31" in lines
    assert "Swin 22K 32 83.5 - 1.00 - 2.000 - -" in lines


def test_table_6_with_throughput(monkeypatch, capsys):
    monkeypatch.setattr(tables, "count_table_6", lambda: FIGURES)
    assert main(["tables", "6", "--throughput", "--batch", "2", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["conditions"]["batch"] == 2
    ours, theirs = result["rows"]
    assert ours["ratio"] == pytest.approx(ours["throughput"] / theirs["throughput"])
    assert main(["tables", "6", "--throughput", "--rounds", "1"]) == 0
    assert "batch 1, float32" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [["tables", "99"], ["tables"], ["tables", "6", "--batch", "0"]])
def test_mistakes(words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    assert "tables" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("problem", 1)])
def test_doctor(monkeypatch, capsys, status, code):
    found = Finding("[core]", "there", status, "" if status == "ok" else "do [this]")
    monkeypatch.setattr(doctor, "examine", lambda: [found])
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert "[core]" in out
    assert ("Nothing to do" if status == "ok" else "do [this]") in out
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)[0]["status"] == status

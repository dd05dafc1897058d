"""The report of a run: complete, self-contained, and honest about a run that cannot have one."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from replknet.analysis.deployment import measure_deployment
from replknet.analysis.plots import running_mean
from replknet.analysis.report import SHOWN_EXAMPLES, read_run, write_report
from replknet.models import create_model, save_checkpoint

TINY = {"channels": (8, 16), "kernels": (7, 5), "layers": (1, 1), "small_kernel": 3}
NAMES = ["cat <&>", "dog"]


def example(source: Path, target: int, prediction: int) -> dict[str, object]:
    return {
        "index": 0,  # of no use once the data set has changed
        "target": target,
        "prediction": prediction,
        "probability": 0.75,
        "true_probability": 0.75 if target == prediction else 0.25,
        "source": str(source),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as training leaves it, with a better first evaluation than second."""
    torch.manual_seed(0)
    images = tmp_path / "images"
    for split in ("train", "val"):
        for number, name in enumerate(NAMES):
            folder = images / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                pixels = np.full((20, 24, 3), 60 * index + 30 * number, np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    preprocessing = {
        "input_size": 16,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    settings = {
        "model": {"name": "replknet_nano"},
        "data": {"root": str(images), "format": "folder"},
        "preprocessing": preprocessing,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "environment.json").write_text(json.dumps({"started": "today", "device": "cpu"}))
    records: list[dict[str, object]] = []
    for epoch, top1 in ((1, 75.0), (2, 50.0)):
        records += [
            {"step": 3 * epoch + i, "epoch": epoch, "loss": 2.0 / epoch, "lr": 0.1}
            for i in range(3)
        ]
        evaluation = {
            "top1": top1,
            "top5": 100.0,
            "loss": 0.5,
            "images": 6,
            "confusion_matrix": [[2, 1], [0, 3]],
            "per_class": [
                {"name": name, "images": 3, "recall": 0.5, "precision": None, "f1": 0.5}
                for name in NAMES
            ],
            "best": [example(images / "val" / NAMES[0] / f"{i}.png", 0, 0) for i in range(3)],
            "worst": [example(images / "val" / NAMES[1] / f"{i}.png", 1, 0) for i in range(3)],
        }
        records.append({"step": 3 * epoch + 3, "epoch": epoch, "evaluation": evaluation})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(lines)
    kwargs = {**TINY, "num_classes": 2}
    metadata = {
        "task": "classification",
        "model": {"name": "replknet_nano", "kwargs": kwargs},
        "class_names": NAMES,
    }
    model = create_model("replknet_nano", **kwargs)
    save_checkpoint(run / "checkpoints" / "best.safetensors", model, metadata)
    return run


def test_page_shows_the_best_evaluation_and_needs_no_other_file(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert "75.00 %" in page
    assert "50.00 %" not in page
    assert "cat &lt;&amp;&gt;" in page
    assert page.count("<svg") == 2
    outside = [link for link in re.findall(r'(?:src|href)="([^"#]*)', page) if link]
    assert all(link.startswith("data:") for link in outside)
    assert len(shades(page)) == 6 <= 2 * SHOWN_EXAMPLES
    assert shades(page) == [30, 90, 150, 0, 60, 120]  # the dogs, told wrong; then the cats
    assert "no longer there" not in page


def test_examples_keep_their_image_and_class_when_the_data_changes(run: Path) -> None:
    validation = run.parent / "images" / "val"
    (validation / "dog" / "0.png").unlink()
    (validation / "dog" / "1.png").write_bytes(b"no image")
    for split in ("train", "val"):
        (validation.parent / split / "ant").mkdir()
        Image.new("RGB", (24, 20), "white").save(validation.parent / split / "ant" / "0.png")
    page = write_report(run).read_text(encoding="utf-8")
    assert shades(page) == [150, 0, 60, 120]
    assert page.count("image no longer there") == 2
    assert page.count("is dog, 25.0") == 3
    assert ">ant" not in page


def test_model_with_more_outputs_than_the_data_has_classes(run: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if evaluation := record.get("evaluation"):
            unused = {"name": "unused 2", "images": 0, "recall": None, "precision": 0, "f1": 0}
            evaluation["per_class"].append(unused)
            evaluation["confusion_matrix"] = [[2, 1, 0], [0, 2, 1], [0, 0, 0]]
            evaluation["worst"][0]["prediction"] = 2
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert '<span class="bad">unused 2 75.0' in write_report(run).read_text(encoding="utf-8")


def shades(page: str) -> list[int]:
    """Brightness of the images on a page, in their order."""
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)', page)
    images = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
    return [image.convert("L").getpixel((0, 0)) for image in images]


def test_run_without_evaluation_is_refused(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1}\n')
    with pytest.raises(ValueError, match="not been evaluated"):
        read_run(run)


def test_directory_without_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        read_run(tmp_path)


def test_deployment_counts_what_folding_removes() -> None:
    torch.manual_seed(0)
    model = create_model("replknet_nano", **TINY)
    deployment = measure_deployment(model, torch.randn(4, 3, 16, 16), batch=2)
    trained, merged, fused = deployment.forms
    stem, stage, transition, final = 4, 8, 2, 1
    assert trained.norms == stem + 2 * stage + transition + final
    assert fused.norms == 0
    assert trained.convolutions == merged.convolutions + 2
    assert trained.flops > merged.flops == fused.flops
    assert deployment.equivalence.agreement == 1
    assert (deployment.images, deployment.batch) == (4, 2)


def test_running_mean_looks_back_only() -> None:
    values = [float(i) for i in range(40)]  # a window of two
    means = running_mean(values)
    assert means[0] == 0
    assert means[-1] == 38.5

"""What a checkpoint is measured on."""

import pytest
import torch
from PIL import Image

from replknet.engine.classification import ClassificationEvalConfig, evaluate_classifier
from replknet.models import save_checkpoint
from replknet.tasks.classification import (
    ClassificationConfig,
    ClassificationTask,
    DataConfig,
    ModelConfig,
    Preprocessing,
)

TINY = {"layers": (1, 1, 1), "channels": (8, 8, 8), "kernels": (5, 5, 5), "small_kernel": 3}


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (16, 16)).save(tmp_path / "pets" / name / f"{number}.png")
    return str(tmp_path / "pets")


@pytest.mark.parametrize(
    ("asked", "warned"), [({}, False), ({"split_seed": 3}, False), ({"split_seed": 4}, True)]
)
def test_images_that_the_training_held_out(folder, tmp_path, caplog, asked, warned):
    model = ModelConfig("replknet_nano", kwargs=TINY)
    trained_on = DataConfig(folder, split_seed=3)
    task = ClassificationTask(ClassificationConfig(model, trained_on, Preprocessing(16)))
    torch.manual_seed(0)
    path = tmp_path / "pets.safetensors"
    save_checkpoint(path, task.build_model(), task.metadata())
    data = DataConfig(folder, **asked)
    metrics = evaluate_classifier(
        ClassificationEvalConfig(checkpoint=path, data=data, workers=0, device="cpu")
    )
    measured = {example["source"] for example in metrics["worst"]}
    held_out = {task.val_data.source(index) for index in range(len(task.val_data))}
    assert (measured == held_out) != warned
    assert ("may be among those" in caplog.text) == warned

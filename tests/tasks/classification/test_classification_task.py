import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torch import nn

from replknet.models import create_model, save_checkpoint
from replknet.tasks.classification import (
    Augmentation,
    ClassificationConfig,
    ClassificationTask,
    DataConfig,
    ModelConfig,
    Preprocessing,
)
from replknet.tasks.classification.class_names import imagenet_1k_names, imagenet_22k_names
from replknet.tasks.task import LoaderOptions

SMALL = Preprocessing(16, (0.5,) * 3, (0.25,) * 3, crop_pct=1.0)
TINY = {"layers": (1, 1, 1), "channels": (8, 8, 8), "kernels": (5, 5, 5), "small_kernel": 3}


def task_of(root, *, class_names=None, loss="cross_entropy", model=None, **augmentation):
    config = ClassificationConfig(
        model or ModelConfig("replknet_nano", kwargs=TINY),
        DataConfig(str(root)),
        SMALL,
        Augmentation(**augmentation),
        loss,
    )
    return ClassificationTask(config, class_names=class_names)


class Constant(nn.Module):
    """Logits that do not depend on the image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, image):
        return self.logits.expand(len(image), -1)


def test_a_model_is_built_trained_and_evaluated(cats_and_dogs):
    task = task_of(cats_and_dogs)
    model = task.build_model()
    assert model.num_classes == 2
    batch = next(task.train_loader(LoaderOptions(4)).epoch(0))
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())
    evaluator = task.evaluator()
    for batch in task.eval_loader(LoaderOptions(3)):
        evaluator.update(model.eval(), batch)
    result = evaluator.compute()
    assert result["images"] == 4
    assert result[task.primary_metric] in (0, 25, 50, 75, 100)
    assert {row["name"] for row in result["per_class"]} == {"cat", "dog"}
    assert result["worst"][0]["source"].startswith(str(cats_and_dogs))


def test_greyscale_models_get_greyscale_images(cats_and_dogs):
    config = ClassificationConfig(
        ModelConfig("replknet_nano", kwargs=TINY),
        DataConfig(str(cats_and_dogs)),
        Preprocessing(16, (0.5,), (0.25,), crop_pct=1.0),
    )
    task = ClassificationTask(config)
    batch = next(task.train_loader(LoaderOptions(4)).epoch(0))
    assert batch["image"].shape == (4, 1, 16, 16)
    assert task.build_model()(batch["image"]).shape == (4, 2)


def test_smoothed_cross_entropy(cats_and_dogs):
    task = task_of(cats_and_dogs, mixup=0, cutmix=0, smoothing=0.2)
    batch = {"image": torch.zeros(2, 3, 16, 16), "target": torch.tensor([0, 1])}
    probability = 0.9
    logits = [math.log(probability), math.log(1 - probability)]
    right, wrong = -logits[0], -logits[1]
    expected = (0.9 * right + 0.1 * wrong + 0.9 * wrong + 0.1 * right) / 2
    assert task.loss(Constant(logits), batch).item() == pytest.approx(expected, rel=1e-6)


def test_mixed_targets_are_not_smoothed_again(cats_and_dogs):
    task = task_of(cats_and_dogs, smoothing=0.2)
    target = torch.tensor([[0.3, 0.7]])
    logits = [0.5, -1.0]
    expected = -(target * torch.tensor([logits]).log_softmax(1)).sum()
    loss = task.loss(Constant(logits), {"image": torch.zeros(1, 3, 4, 4), "target": target})
    torch.testing.assert_close(loss, expected)
    batch = next(task.train_loader(LoaderOptions(4)).epoch(0))
    assert batch["target"].min() >= 0.1 - 1e-6


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_binary_cross_entropy(cats_and_dogs, mixup):
    task = task_of(cats_and_dogs, loss="bce", mixup=mixup, cutmix=0, smoothing=0.1)
    batch = next(task.train_loader(LoaderOptions(4)).epoch(0))
    target = batch["target"]
    if not mixup:
        target = torch.full((4, 2), 0.05).scatter(1, target[:, None], 0.95)
    logits = [0.5, -1.0]
    expected = F.binary_cross_entropy_with_logits(torch.tensor(logits).expand(4, 2), target)
    torch.testing.assert_close(task.loss(Constant(logits), batch), expected)


def test_the_checkpoint_tells_all_that_prediction_needs(cats_and_dogs, tmp_path):
    task = task_of(cats_and_dogs)
    metadata = task.metadata()
    assert metadata["task"] == "classification"
    assert metadata["class_names"] == ["cat", "dog"]
    assert Preprocessing.from_dict(metadata["preprocessing"]) == SMALL
    model = task.build_model().eval()
    save_checkpoint(tmp_path / "pets.safetensors", model, metadata)
    again = create_model(checkpoint=tmp_path / "pets.safetensors").eval()
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(image), model(image))


def test_arguments_of_the_checkpoint_to_start_from_are_kept(cats_and_dogs, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    kwargs = {**TINY, "stem_stride": 1}  # which no weight shows
    before = task_of(cats_and_dogs, model=ModelConfig("replknet_nano", kwargs=kwargs))
    save_checkpoint(first, before.build_model(), before.metadata())
    task = task_of(cats_and_dogs, model=ModelConfig("replknet_nano", str(first)))
    model = task.build_model().eval()
    first.unlink()  # by now it is not needed
    save_checkpoint(second, model, task.metadata())
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(create_model(checkpoint=second).eval()(image), model(image))


@pytest.mark.parametrize("name", ["num_classes", "in_chans"])
def test_arguments_that_follow_from_the_data_are_refused(name):
    with pytest.raises(ValueError, match=f"must not hold '{name}'"):
        ModelConfig(kwargs={name: 3})


def test_another_normalisation_than_that_of_the_checkpoint_is_told(cats_and_dogs, tmp_path, caplog):
    path = tmp_path / "pets.safetensors"
    before = task_of(cats_and_dogs)
    save_checkpoint(path, before.build_model(), before.metadata())
    config = replace(before.config, model=ModelConfig("replknet_nano", str(path), kwargs=TINY))
    ClassificationTask(config).build_model()
    assert not caplog.records
    other = replace(SMALL, mean=(0.4,) * 3)
    ClassificationTask(replace(config, preprocessing=other)).build_model()
    (record,) = caplog.records  # only of the mean
    assert "--preprocessing.mean '[0.5, 0.5, 0.5]'" in record.getMessage()


def test_heads_of_another_size(cats_and_dogs):
    wide = task_of(cats_and_dogs, model=ModelConfig("replknet_nano", num_classes=4, kwargs=TINY))
    assert wide.class_names == ("cat", "dog", "unused 2", "unused 3")
    assert wide.build_model().num_classes == 4
    narrow = task_of(cats_and_dogs, model=ModelConfig("replknet_nano", num_classes=1, kwargs=TINY))
    with pytest.raises(ValueError, match="2 classes, more than the 1 outputs"):
        narrow.build_model()


def test_a_split_may_lack_the_last_classes(tmp_path):
    for prefix, labels in (("train", [0, 1, 2, 3]), ("t10k", [0, 1])):
        sizes = len(labels).to_bytes(4, "big")
        images = sizes + bytes([0, 0, 0, 28, 0, 0, 0, 28]) + bytes(784 * len(labels))
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + images)
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + sizes + bytes(labels)
        )
    task = task_of(tmp_path)
    assert task.class_names == ("0", "1", "2", "3")
    assert len(task.val_data) == 2


@pytest.mark.parametrize(
    ("outputs", "names", "reset_head", "kept"),
    [
        (5, None, None, False),
        (2, None, None, True),
        (2, ["cat", "dog"], None, True),
        (2, ["fox", "hen"], None, False),
        (2, ["fox", "hen"], False, True),
        (2, ["cat", "dog"], True, False),
    ],
)
def test_fine_tuning_keeps_the_classifier_of_the_same_classes(
    cats_and_dogs, tmp_path, caplog, outputs, names, reset_head, kept
):
    path = tmp_path / "other.safetensors"
    other = create_model("replknet_nano", num_classes=outputs, **TINY)
    save_checkpoint(path, other, {"class_names": names} if names else {})
    config = ModelConfig("replknet_nano", str(path), reset_head=reset_head, kwargs=TINY)
    model = task_of(cats_and_dogs, model=config).build_model()
    weights, others = model.state_dict(), other.state_dict()
    assert torch.equal(weights["stem.0.conv.weight"], others["stem.0.conv.weight"])
    assert (outputs == 2 and torch.equal(weights["head.weight"], others["head.weight"])) == kept
    assert ("starting a new classifier" in caplog.text) == (reset_head is None and not kept)


def test_a_classifier_of_another_size_cannot_be_kept(cats_and_dogs, tmp_path):
    path = tmp_path / "other.safetensors"
    save_checkpoint(path, create_model("replknet_nano", num_classes=5, **TINY), {})
    config = ModelConfig("replknet_nano", str(path), reset_head=False, kwargs=TINY)
    with pytest.raises(ValueError, match="5 classes, the model 2"):
        task_of(cats_and_dogs, model=config).build_model()


def test_classes_of_an_existing_model_are_matched_by_name(cats_and_dogs):
    names = ("ant", "dog", "bee", "cat")
    task = task_of(cats_and_dogs, class_names=names)
    assert task.class_names == names
    targets = torch.cat([batch["target"] for batch in task.eval_loader(LoaderOptions(8))])
    assert targets.tolist() == [3, 3, 1, 1]
    assert task.metadata()["model"]["kwargs"]["num_classes"] == 4
    with pytest.raises(ValueError, match=r"does not know 1 of the data's 2 classes, such as dog"):
        task_of(cats_and_dogs, class_names=("cat", "wolf")).eval_loader(LoaderOptions(8))


@pytest.mark.parametrize(
    ("label_set", "names"),
    [("imagenet-1k", imagenet_1k_names()), ("imagenet-22k", imagenet_22k_names())],
)
def test_published_models_know_the_classes_of_imagenette(tmp_path, write_images, label_set, names):
    folders = ["n01440764", "n02102040", "n02979186", "n03000684", "n03028079"]
    folders += ["n03394916", "n03417042", "n03425413", "n03445777", "n03888257"]
    write_images(tmp_path, *(f"val/{folder}/1.png" for folder in folders), size=(8, 8))
    data = task_of(tmp_path, class_names=names).val_data
    outputs = [data[index][1] for index in range(10)]
    labels = ImageNetInfo(label_set).label_names()
    assert [labels[output] for output in outputs] == folders


def test_any_timm_model_will_do(cats_and_dogs):
    model = task_of(cats_and_dogs, model=ModelConfig("test_convnext")).build_model()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)

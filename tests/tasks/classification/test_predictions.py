import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from replknet.models import create_model, save_checkpoint
from replknet.models.variants import PUBLISHED_FILES
from replknet.tasks.classification import Preprocessing
from replknet.tasks.classification.classifier import Classifier, load_classifier
from replknet.tasks.classification.overlay import MIN_WIDTH, draw_prediction
from replknet.tasks.classification.predict import Label, Prediction, find_images, predict

TINY = {"layers": (1, 1, 1), "channels": (8, 8, 8), "kernels": (5, 5, 5), "small_kernel": 3}
SMALL = Preprocessing(8, (0.0,) * 3, (1.0,) * 3, crop_pct=1.0)


class Brightest(nn.Module):
    """Finds the channel that is brightest."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return self.scale * images.mean(dim=(2, 3))


@pytest.fixture
def brightest():
    return Classifier(Brightest(), SMALL, ("red", "green", "blue"), torch.device("cpu"))


@pytest.fixture
def photos(tmp_path):
    for name in ("red", "green", "blue"):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 10), name).save(path)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "photos" / "notes.txt").write_text("no image either")
    return tmp_path / "photos"


def randomised(model):
    """A model with weights and statistics as if trained, negative scales among them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_(generator=generator)
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


# Finding images


def test_sources_are_found_in_their_order(photos):
    (photos / "more").mkdir()
    Image.new("RGB", (4, 4)).save(photos / "more" / "x.PNG")
    listed = io.StringIO(f"{photos}/red.png\n\n{photos}/more\n")
    sources = [f"{photos}/green.png", "-", f"{photos}/b*", str(photos), "missing.jpg"]
    found = [path.removeprefix(f"{photos}/") for path in find_images(sources, listed)]
    assert found[:3] == ["green.png", "red.png", "more/x.PNG"]
    assert found[3:5] == ["blue.png", "broken.jpg"]
    assert found[5:-1] == ["blue.png", "broken.jpg", "green.png", "more/x.PNG", "red.png"]
    assert found[-1] == "missing.jpg"


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a[1].png")
    (tmp_path / "empty").mkdir()
    names = [str(tmp_path / "a[1].png"), str(tmp_path / "empty")]
    assert list(find_images(names, io.StringIO())) == names


def test_hidden_files_under_folders_are_passed_over(photos, monkeypatch):
    (photos / "._red.png").write_bytes(b"macOS")
    (photos / ".cache").mkdir()
    Image.new("RGB", (4, 4)).save(photos / ".cache" / "x.png")
    expected = ["blue.png", "broken.jpg", "green.png", "red.png"]
    assert list(find_images([str(photos)], io.StringIO())) == [f"{photos}/{n}" for n in expected]
    assert list(find_images([f"{photos}/.cache"], io.StringIO())) == [f"{photos}/.cache/x.png"]
    monkeypatch.chdir(photos)
    assert list(find_images(["."], io.StringIO())) == expected


def test_a_folder_without_images_is_told(brightest, tmp_path):
    [prediction] = predict(brightest, find_images([str(tmp_path)], io.StringIO()))
    assert (prediction.source, prediction.error) == (str(tmp_path), "no images in it")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "[", "**"])
def test_names_that_no_file_can_have_are_reported(brightest, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [prediction] = predict(brightest, find_images(["-"], io.StringIO(name)))
    assert prediction.error
    assert prediction.source == name


# Predicting


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_predictions_keep_the_order_and_report_what_cannot_be_read(brightest, photos, batch_size):
    names = ["green.png", "broken.jpg", "blue.png", "gone.png", "red.png"]
    sources = [str(photos / name) for name in names]
    predictions = list(predict(brightest, sources, batch_size=batch_size))
    assert [p.source for p in predictions] == sources
    assert [p.labels[0].name if p.labels else None for p in predictions] == [
        "green",
        None,
        "blue",
        None,
        "red",
    ]
    assert "UnidentifiedImageError" in predictions[1].error
    assert "FileNotFoundError" in predictions[3].error
    assert predictions[0].error is None
    assert sum(brightest.model.batches) == 3
    assert max(brightest.model.batches) <= batch_size


def test_probabilities_are_those_of_the_model(brightest, photos):
    [prediction] = predict(brightest, [str(photos / "red.png")], top_k=2)
    expected = torch.tensor([10.0, 0.0, 0.0]).softmax(0)
    assert prediction.labels[0].index == 0
    assert [label.probability for label in prediction.labels] == pytest.approx(
        expected[:2].tolist()
    )
    [every] = predict(brightest, [str(photos / "red.png")], top_k=50)
    assert len(every.labels) == 3


def test_images_are_read_as_they_are_needed(brightest, photos):
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield str(photos / "red.png")

    predictions = predict(brightest, endless(), batch_size=4)
    assert next(predictions).labels[0].name == "red"
    assert len(asked) == 4
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_impossible_options_are_refused(brightest):
    with pytest.raises(ValueError, match="must be positive, got 0 and 8"):
        predict(brightest, [], top_k=0)


# Loading


def test_our_own_file_says_everything(tmp_path):
    model = randomised(create_model("replknet_nano", num_classes=3, in_chans=1, **TINY))
    preprocessing = Preprocessing(16, (0.3,), (0.4,), crop_pct=1.0)
    metadata = {
        "task": "classification",
        "model": {"name": "replknet_nano", "kwargs": {"num_classes": 3, "in_chans": 1, **TINY}},
        "preprocessing": preprocessing.to_dict(),
        "class_names": ["ant", "bee", "cat"],
    }
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, metadata)
    classifier = load_classifier(path)
    assert classifier.preprocessing == preprocessing
    assert classifier.class_names == ("ant", "bee", "cat")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in classifier.model.modules())
    image = torch.randn(2, 1, 16, 16)
    expected = model(image)
    torch.testing.assert_close(classifier.model(image), expected, rtol=1e-4, atol=1e-4)
    assert load_classifier(path, input_size=32).preprocessing == preprocessing.resized(32)
    save_checkpoint(path, model, {**metadata, "task": "segmentation"})
    with pytest.raises(ValueError, match="trained for segmentation"):
        load_classifier(path)


def test_a_published_file_is_known_by_its_name(tmp_path, monkeypatch):
    model = create_model("replknet_nano", num_classes=1000)
    monkeypatch.setitem(PUBLISHED_FILES, "RepLKNet-nano_published", "replknet_nano.untrained")
    torch.save({"model": model.state_dict()}, tmp_path / "RepLKNet-nano_published.pth")
    named = load_classifier(tmp_path / "RepLKNet-nano_published.pth")
    assert (named.preprocessing.input_size, named.preprocessing.crop_pct) == (32, 1.0)
    assert named.class_names[1] == "goldfish"
    torch.save(model.state_dict(), tmp_path / "renamed.pth")
    assert (
        load_classifier(tmp_path / "renamed.pth", model="replknet_nano").class_names[0] == "tench"
    )


@pytest.mark.parametrize(
    ("file", "size", "mean", "classes"),
    [
        ("RepLKNet-31B_ImageNet-1K_224", 224, 0.485, 1000),
        ("RepLKNet-31B_ImageNet-1K_384", 384, 0.485, 1000),
        ("RepLKNet-31B_ImageNet-22K", 224, 0.485, 21841),
        ("RepLKNet-31B_ImageNet-22K-to-1K_224", 224, 0.485, 1000),
        ("RepLKNet-31B_ImageNet-22K-to-1K_384", 384, 0.485, 1000),
        ("RepLKNet-31L_ImageNet-22K", 224, 0.485, 21841),
        ("RepLKNet-31L_ImageNet-22K-to-1K_384", 384, 0.485, 1000),
        ("RepLKNet-XL_MegData73M_pretrain", 224, 0.5, 21841),
        ("RepLKNet-XL_MegData73M_ImageNet1K", 320, 0.5, 1000),
    ],
)
def test_published_files_have_their_preprocessing(file, size, mean, classes):
    cfg = timm.get_pretrained_cfg(PUBLISHED_FILES[file])
    assert cfg.num_classes == classes
    known = {key: getattr(cfg, key) for key in ("input_size", "mean", "std", "interpolation")}
    stored = Preprocessing.from_dict(
        {**known, "crop_pct": cfg.crop_pct, "crop_mode": cfg.crop_mode}
    )
    std = (0.5,) * 3 if mean == 0.5 else Preprocessing().std
    assert stored.mean[0] == mean
    assert stored == Preprocessing(size, stored.mean, std)  # crop by the published rule


# Drawing


@pytest.mark.parametrize("size", [(28, 28), (500, 200), (3000, 2000), (1000, 1)])
def test_bars_are_drawn_below_the_image(size):
    labels = (Label(0, "a name that is far too long for one line " * 3, 0.75), Label(1, "b", 0.0))
    drawing = draw_prediction(Image.new("RGB", size, "red"), Prediction("x", labels))
    assert drawing.width >= MIN_WIDTH
    pixels = np.asarray(drawing)
    assert tuple(pixels[0, 5]) == (255, 0, 0)
    height = max(round(size[1] * drawing.width / size[0]), 1)
    panel = pixels[height:]
    bar = (panel == (0x9E, 0xC5, 0xFE)).all(axis=2)
    row = bar[12]
    assert row.sum() / (drawing.width - 16 - 56) == pytest.approx(0.75, abs=0.02)
    assert bar[-20:].sum() <= 100  # the second bar has no length
    dark = (panel < 100).all(axis=2)
    assert dark[:30].any()
    assert not dark[:, :8].any()


def test_a_probability_that_is_no_number_has_no_bar():
    unknown = Prediction("x", (Label(0, "a", float("nan")),))
    drawing = np.asarray(draw_prediction(Image.new("RGB", (400, 20), "red"), unknown))
    assert (drawing == (0x9E, 0xC5, 0xFE)).all(axis=2).sum() <= 50

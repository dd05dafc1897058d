import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import resolve_data_config

from replknet.tasks.classification import Augmentation, Preprocessing


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    red = np.broadcast_to(np.linspace(0, 255, width)[None, :], (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, red * 0], axis=-1).astype(np.uint8))


def test_small_inputs_are_cropped_from_an_enlarged_image():
    half = Preprocessing(224, (0.0,) * 3, (1.0,) * 3)
    image = gradient(512, 256)
    pixels = half.eval_transform()(image)
    assert pixels.shape == (3, 224, 224)
    expected = image.resize((512, 256), Image.Resampling.BICUBIC).crop((144, 16, 368, 240))
    difference = pixels[0] * 255 - torch.from_numpy(np.array(expected)[..., 0])
    assert half.crop_pct == 0.875  # 224 / 0.875 = 256: the image needs no resizing
    assert difference.abs().max() <= 0.51


@pytest.mark.parametrize(("size", "span"), [(224, 0.49), (320, 0.49), (384, 1.0), (512, 1.0)])
def test_large_inputs_show_the_whole_image(size, span):
    plain = Preprocessing(size, (0.0,) * 3, (1.0,) * 3)
    red = plain.eval_transform()(gradient(1024, 576))[0]
    assert red.shape == (size, size)
    assert (red.max() - red.min()).item() == pytest.approx(span, abs=0.02)


def test_normalisation_of_rgb_and_greyscale():
    image = Image.new("RGB", (64, 64), (255, 128, 0))
    pixels = Preprocessing(32, (0.5, 0.25, 0.0), (0.5, 0.5, 2.0)).eval_transform()(image)
    expected = torch.tensor([1.0, (128 / 255 - 0.25) / 0.5, 0.0])
    torch.testing.assert_close(pixels[:, 5, 5], expected)
    grey = Preprocessing(32, (0.5,), (0.25,))
    assert (grey.channels, grey.image_mode) == (1, "L")
    pixels = grey.eval_transform()(Image.new("L", (64, 64), 255))
    assert pixels.shape == (1, 32, 32)
    torch.testing.assert_close(pixels[0, 3, 3], torch.tensor(2.0))


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        Preprocessing(384),
        Preprocessing(28, (0.286,), (0.353,), crop_pct=1.0),
        Preprocessing(320, (0.5,) * 3, (0.5,) * 3, interpolation="bilinear"),
    ],
)
def test_travels_through_json_and_timm(preprocessing):
    stored = json.loads(json.dumps(preprocessing.to_dict()))
    assert Preprocessing.from_dict(stored) == preprocessing
    through_timm = resolve_data_config(pretrained_cfg=stored)
    assert Preprocessing.from_dict(through_timm) == preprocessing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "input_size must be positive, got 0"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, r"3 values \(RGB\) or 1"),
        ({"mean": (0.5,)}, r"got \(0.5,\)"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be positive"),
        ({"crop_pct": 1.5}, r"crop_pct must be in \(0, 1\], got 1.5"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**arguments)


def test_a_stored_rectangle_is_refused():
    stored = {**Preprocessing().to_dict(), "input_size": [3, 224, 320]}
    with pytest.raises(ValueError, match="square, got 224 x 320"):
        Preprocessing.from_dict(stored)


def test_another_size_follows_the_published_rule_where_the_first_did():
    assert Preprocessing(224).resized(384) == Preprocessing(384)
    assert Preprocessing(384).resized(320) == Preprocessing(320)
    own = Preprocessing(28, (0.5,), (0.5,), crop_pct=1.0)
    assert own.resized(64) == Preprocessing(64, (0.5,), (0.5,), crop_pct=1.0, crop_mode="center")


def test_published_augmentation_is_the_default():
    steps = [type(s).__name__ for s in Augmentation().train_transform(Preprocessing()).transforms]
    assert steps == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_published_augmentation_takes_both_kinds_of_image(channels):
    preprocessing = Preprocessing(32, (0.5,) * channels, (0.5,) * channels)
    transform = Augmentation().train_transform(preprocessing)
    image = gradient(40, 40).convert(preprocessing.image_mode)
    random.seed(0)
    results = [transform(image) for _ in range(50)]
    assert {tuple(result.shape) for result in results} == {(channels, 32, 32)}
    assert all(result.isfinite().all() for result in results)
    assert len({result.sum().item() for result in results}) > 40


def test_small_images_are_shifted_and_flipped_but_not_scaled():
    preprocessing = Preprocessing(28, (0.0,), (1.0,), crop_pct=1.0)
    augmentation = Augmentation("pad", auto_augment=None, color_jitter=0, re_prob=0, hflip=0.5)
    transform = augmentation.train_transform(preprocessing)
    pixels = np.random.default_rng(0).integers(1, 256, (28, 28), dtype=np.uint8)
    padded = np.pad(pixels, 2)
    allowed = {
        padded[y : y + 28, x : x + 28][:, ::flip].tobytes()
        for y in range(5)
        for x in range(5)
        for flip in (1, -1)
    }
    seen = set()
    torch.manual_seed(0)
    for _ in range(200):
        result = transform(Image.fromarray(pixels))[0]
        seen.add((result * 255).round().to(torch.uint8).numpy().tobytes())
    assert seen <= allowed
    assert len(seen) > 40


def test_small_images_can_be_erased_and_jittered():
    preprocessing = Preprocessing(28, (0.5,), (0.25,), crop_pct=1.0)
    augmentation = Augmentation("pad", padding=0, auto_augment=None, re_prob=1.0, re_mode="const")
    random.seed(0)
    result = augmentation.train_transform(preprocessing)(Image.new("L", (28, 28), 255))
    erased = (result == 0).float().mean().item()
    assert 0.01 < erased < 0.4
    assert len(result.unique()) == 2


def test_small_images_have_no_automatic_policy():
    with pytest.raises(ValueError, match="auto_augment"):
        Augmentation(crop="pad").train_transform(Preprocessing())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"smoothing": 1.0}, "smoothing must be in"), ({"mixup": -0.1}, "must not be negative")],
)
def test_impossible_augmentation_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_mixing_can_be_turned_off():
    assert Augmentation().mix(10) is not None
    assert Augmentation(mixup=0, cutmix=0).mix(10) is None
    assert Augmentation(mixup_prob=0).mix(10) is None


@pytest.mark.parametrize("policy", ["rand-m10-n3-inc1", "original", "originalr", "augmix-m10"])
def test_augmentations_of_any_strength_work(policy):
    transform = Augmentation(auto_augment=policy).train_transform(Preprocessing(16))
    image = Image.effect_noise((20, 20), 64).convert("RGB")
    random.seed(0)
    for _ in range(200):
        assert transform(image).isfinite().all()

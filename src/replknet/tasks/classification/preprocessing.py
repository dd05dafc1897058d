"""How an image becomes the input of a classifier, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

from PIL.Image import Image
from PIL.Image import new as new_image
from timm.data import Mixup, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms

Transform = Callable[[Image], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """Size, scaling and normalisation of a model's input; travels in its checkpoint.

    Args:
        input_size: height and width in pixels.
        mean: of each channel, for pixels in [0, 1]; three values for RGB, one for greyscale.
        std: of each channel, likewise.
        interpolation: of the resizing.
        crop_pct: share of the resized image's side that is kept; null = as published: 0.875 with
            "center", all with "squash". Images no larger than the input want 1.0.
        crop_mode: "center" resizes the short side and crops, "squash" resizes both sides,
            "border" the long side and pads; null = as published: "squash" from 384 pixels on.
    """

    input_size: int = 224
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_pct: float | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None

    def __post_init__(self) -> None:
        if self.input_size < 1:
            raise ValueError(f"input_size must be positive, got {self.input_size}")
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ValueError(
                "mean and std must both have 3 values (RGB) or 1 (greyscale), "
                f"got {self.mean} and {self.std}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {self.crop_pct}")
        squash = self.input_size >= 384
        crop_mode = self.crop_mode or ("squash" if squash else "center")
        crop_pct = self.crop_pct or (1.0 if crop_mode == "squash" else 0.875)
        object.__setattr__(self, "crop_mode", crop_mode)
        object.__setattr__(self, "crop_pct", crop_pct)

    @property
    def channels(self) -> int:
        """Input channels of the model: 3 for RGB, 1 for greyscale."""
        return len(self.mean)

    @property
    def image_mode(self) -> Literal["RGB", "L"]:
        """Pillow mode in which images must be decoded."""
        return "RGB" if self.channels == 3 else "L"

    def eval_transform(self) -> Transform:
        """From an image in ``image_mode`` to a normalised (channels, input_size, input_size)."""
        return create_transform(
            self.input_size,
            is_training=False,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def resized(self, input_size: int) -> Preprocessing:
        """The same for another size; the crop follows the published rule if it did before."""
        as_published = replace(self, crop_pct=None, crop_mode=None)
        if self == as_published:
            return replace(as_published, input_size=input_size, crop_pct=None, crop_mode=None)
        return replace(self, input_size=input_size)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, under timm's names: ``input_size`` is [channels, height, width]."""
        size = [self.channels, self.input_size, self.input_size]
        return {
            **asdict(self),
            "input_size": size,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Inverse of ``to_dict``; also takes what ``timm.data.resolve_data_config`` returns."""
        _, height, width = values["input_size"]
        if height != width:
            raise ValueError(f"input_size must be square, got {height} x {width}")
        return cls(
            input_size=height,
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            interpolation=values["interpolation"],
            crop_pct=values["crop_pct"],
            crop_mode=values["crop_mode"],
        )


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the training images; the defaults are those of the published recipes.

    Args:
        crop: "resized" takes a random part and resizes it; "pad" resizes, pads and crops back, as
            is usual for small images.
        scale: of the random part, as a share of the image's area.
        ratio: of the random part's sides.
        padding: pixels on each side, with "pad".
        hflip: probability of a left-right flip.
        color_jitter: strength of random brightness, contrast and saturation; only without
            auto_augment.
        auto_augment: policy of timm; null = none.
        re_prob: probability of random erasing.
        re_mode: what an erased rectangle is filled with.
        re_count: most rectangles in an image.
        mixup: alpha of mixup; 0 = off.
        cutmix: alpha of CutMix; 0 = off.
        mixup_prob: probability that a batch is mixed.
        switch_prob: probability of CutMix when both are on.
        smoothing: of the labels.
    """

    crop: Literal["resized", "pad"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 2
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    re_prob: float = 0.25
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    re_count: int = 1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"augmentation.smoothing must be in [0, 1), got {self.smoothing}")
        for name in ("hflip", "re_prob", "mixup_prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"augmentation.{name} must be a probability in [0, 1], "
                    f"got {getattr(self, name)}"
                )
        for name in ("mixup", "cutmix", "color_jitter", "padding"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"augmentation.{name} must not be negative (0 turns it off), "
                    f"got {getattr(self, name)}"
                )
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"augmentation.{name} must be two positive numbers, the smaller one first, "
                    f"got {low} and {high}"
                )
        if self.re_count < 1:
            raise ValueError(
                f"augmentation.re_count must be at least 1, got {self.re_count}; "
                "augmentation.re_prob 0 turns erasing off"
            )
        if self.auto_augment:
            _refuse_unknown_policy(self.auto_augment)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are blended with each other."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def train_transform(self, preprocessing: Preprocessing) -> Transform:
        """Like ``preprocessing.eval_transform()``, with the random changes of one image.

        Draws from the global generators of ``random``, numpy and torch.
        """
        if self.crop == "pad":
            return self._pad_and_crop(preprocessing)
        transform = create_transform(
            preprocessing.input_size,
            is_training=True,
            mean=preprocessing.mean,
            std=preprocessing.std,
            interpolation=preprocessing.interpolation,
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            re_prob=self.re_prob,
            re_mode=self.re_mode,
            re_count=self.re_count,
        )
        _allow_no_bits(transform)
        return transform

    def mix(self, num_classes: int) -> Mixup | None:
        """Mixup and CutMix of a batch, which also make its targets dense; None when off.

        Draws from numpy's global generator.
        """
        if not self.mixes:
            return None
        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mixup_prob,
            switch_prob=self.switch_prob,
            mode="batch",
            label_smoothing=self.smoothing,
            num_classes=num_classes,
        )

    def _pad_and_crop(self, preprocessing: Preprocessing) -> Transform:
        if self.auto_augment:
            raise ValueError(
                "crop='pad' is for small images and comes without auto_augment, "
                f"got {self.auto_augment!r}; set auto_augment to null or crop to 'resized'"
            )
        size = preprocessing.input_size
        steps: list[Callable[[Any], Any]] = [
            transforms.Resize((size, size), str_to_interp_mode(preprocessing.interpolation)),
            transforms.RandomCrop(size, padding=self.padding),
            transforms.RandomHorizontalFlip(self.hflip),
        ]
        if self.color_jitter:
            steps.append(transforms.ColorJitter(*(self.color_jitter,) * 3))
        steps += [
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
        if self.re_prob:
            steps.append(
                RandomErasing(
                    self.re_prob, mode=self.re_mode, max_count=self.re_count, device="cpu"
                )
            )
        return transforms.Compose(steps)


def _refuse_unknown_policy(policy: str) -> None:
    """Raise ValueError unless timm can make the augmentations of ``policy``."""
    try:
        create_transform(8, is_training=True, auto_augment=policy)
    except Exception as error:  # whatever its parser raises
        raise ValueError(
            "augmentation.auto_augment must be a policy of timm, such as "
            "rand-m9-mstd0.5-inc1, augmix-m3-w3, 3a, original, originalr, v0 or v0r, or null for "
            f"none, got {policy!r}"
        ) from error


def _allow_no_bits(transform: Any) -> None:
    """Let timm's posterizing keep no bit, as it asks for at times; Pillow 13 refuses that."""
    for step in transform.transforms:
        for op in (*getattr(step, "ops", ()), *chain(*getattr(step, "policy", ()))):
            if op.name.startswith("Posterize"):
                op.aug_fn = partial(_posterize, op.aug_fn)


def _posterize(posterize: Callable[..., Image], image: Image, bits: int, **options: Any) -> Image:
    return posterize(image, bits, **options) if bits > 0 else new_image(image.mode, image.size)

"""The named networks of the family, registered with timm."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from replknet.models.formats import form_of, translate
from replknet.models.replknet import RepLKNet

IMAGENET_22K_CLASSES = 21841

_BASE: dict[str, Any] = {
    "kernels": (31, 29, 27, 13),
    "layers": (2, 2, 18, 2),
    "channels": (128, 256, 512, 1024),
    "small_kernel": 5,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "replknet_31b": _BASE,
    "replknet_31l": {**_BASE, "channels": (192, 384, 768, 1536)},
    "replknet_xl": {
        **_BASE,
        "kernels": (27, 27, 27, 13),
        "channels": (256, 512, 1024, 2048),
        "small_kernel": None,
        "dw_ratio": 1.5,
    },
    "replknet_3": {**_BASE, "kernels": (3, 3, 3, 3), "small_kernel": None},
    "replknet_7": {**_BASE, "kernels": (7, 7, 7, 7)},
    "replknet_13": {**_BASE, "kernels": (13, 13, 13, 13)},
    "replknet_25": {**_BASE, "kernels": (25, 25, 25, 13)},
    "replknet_31t": {**_BASE, "layers": (2, 2, 8, 2), "channels": (96, 192, 384, 768)},
    "replknet_nano": {
        "kernels": (13, 11, 7),
        "layers": (1, 2, 1),
        "channels": (48, 96, 192),
        "small_kernel": 5,
        "stem_stride": 2,
    },
}

# The authors' files tell their input size and normalisation by their names alone.
PUBLISHED_FILES = {
    "RepLKNet-31B_ImageNet-1K_224": "replknet_31b.in1k_224",
    "RepLKNet-31B_ImageNet-1K_384": "replknet_31b.in1k_384",
    "RepLKNet-31B_ImageNet-22K": "replknet_31b.in22k",
    "RepLKNet-31B_ImageNet-22K-to-1K_224": "replknet_31b.in22k_ft_in1k_224",
    "RepLKNet-31B_ImageNet-22K-to-1K_384": "replknet_31b.in22k_ft_in1k_384",
    "RepLKNet-31L_ImageNet-22K": "replknet_31l.in22k",
    "RepLKNet-31L_ImageNet-22K-to-1K_384": "replknet_31l.in22k_ft_in1k_384",
    "RepLKNet-XL_MegData73M_pretrain": "replknet_xl.mg73m",
    "RepLKNet-XL_MegData73M_ImageNet1K": "replknet_xl.mg73m_ft_in1k_320",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring any published layout to the names of ``RepLKNet``, for timm's own loading.

    Raises:
        ValueError: The weights are no RepLKNet, or its form is not that of ``model``.
    """
    names = translate(state_dict).state_dict
    file_form, form = form_of(names), form_of(model.state_dict())
    if file_form != form:
        raise ValueError(
            f"the file holds the {file_form} form, the model has the {form} form; build the model "
            f"with form={file_form!r}"
        )
    return names


def _create_replknet(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    kwargs = {**ARCHITECTURES[variant], **kwargs}
    return build_model_with_cfg(
        RepLKNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(kwargs["layers"]))), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """Preprocessing and origin; no variant has a URL, a user brings the file."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0.conv",
        "classifier": "head",
        "license": "mit",
        **kwargs,
    }


def _published(**kwargs: Any) -> dict[str, Any]:
    return _cfg(
        origin_url="https://github.com/DingXiaoH/RepLKNet-pytorch",
        paper_ids="arXiv:2203.06717",
        paper_name="Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs",
        **kwargs,
    )


# At 384 the whole image is squashed into the square instead of being cropped.
_AT_384 = {
    "input_size": (3, 384, 384),
    "pool_size": (12, 12),
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

default_cfgs = generate_default_cfgs(
    {
        "replknet_31b.in1k_224": _published(),
        "replknet_31b.in1k_384": _published(**_AT_384),
        "replknet_31b.in22k": _published(num_classes=IMAGENET_22K_CLASSES),
        "replknet_31b.in22k_ft_in1k_224": _published(),
        "replknet_31b.in22k_ft_in1k_384": _published(**_AT_384),
        "replknet_31l.in22k_ft_in1k_384": _published(**_AT_384),
        "replknet_31l.in22k": _published(num_classes=IMAGENET_22K_CLASSES),
        "replknet_xl.mg73m_ft_in1k_320": _published(
            input_size=(3, 320, 320), pool_size=(10, 10), **_HALF
        ),
        "replknet_xl.mg73m": _published(num_classes=IMAGENET_22K_CLASSES, **_HALF),
        "replknet_3.untrained": _published(),
        "replknet_7.untrained": _published(),
        "replknet_13.untrained": _published(),
        "replknet_25.untrained": _published(),
        "replknet_31t.untrained": _cfg(),
        "replknet_nano.untrained": _cfg(
            num_classes=10,
            input_size=(3, 32, 32),
            pool_size=(4, 4),
            crop_pct=1.0,
            min_input_size=(3, 16, 16),
        ),
    }
)


@register_model
def replknet_31b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepLKNet-31B, 79.9 M parameters (paper, table 6)."""
    return _create_replknet("replknet_31b", pretrained, **kwargs)


@register_model
def replknet_31l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepLKNet-31L, 172.7 M parameters (paper, table 6)."""
    return _create_replknet("replknet_31l", pretrained, **kwargs)


@register_model
def replknet_xl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepLKNet-XL, 335.4 M parameters: wider large kernels, no small ones (paper, table 6)."""
    return _create_replknet("replknet_xl", pretrained, **kwargs)


@register_model
def replknet_3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """31B with 3x3 kernels in every stage (paper, table 5)."""
    return _create_replknet("replknet_3", pretrained, **kwargs)


@register_model
def replknet_7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """31B with 7x7 kernels in every stage (paper, table 5)."""
    return _create_replknet("replknet_7", pretrained, **kwargs)


@register_model
def replknet_13(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """31B with 13x13 kernels in every stage (paper, table 5 and the ERF study)."""
    return _create_replknet("replknet_13", pretrained, **kwargs)


@register_model
def replknet_25(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """31B with kernels 25, 25, 25, 13 (paper, table 5)."""
    return _create_replknet("replknet_25", pretrained, **kwargs)


@register_model
def replknet_31t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Our own smaller RepLKNet-31, 29 M parameters; not in the paper."""
    return _create_replknet("replknet_31t", pretrained, **kwargs)


@register_model
def replknet_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Our own three-stage RepLKNet for images of 28 to 64 px; not in the paper."""
    return _create_replknet("replknet_nano", pretrained, **kwargs)

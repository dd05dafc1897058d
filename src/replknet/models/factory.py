"""Models by name."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn

from replknet.models.variants import default_cfgs


def list_models() -> list[str]:
    """Names of the RepLKNet variants, also known to ``timm.create_model``."""
    return sorted({name.split(".")[0] for name in default_cfgs})


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Build a RepLKNet variant, or any other model of timm, with untrained weights.

    Args:
        name: Variant, with a tag after a dot to choose its preprocessing
            ("replknet_31b.in1k_384"), or the name of another timm model.
        kwargs: What ``timm.create_model`` takes: num_classes, in_chans, drop_path_rate,
            features_only, out_indices, and the arguments of ``RepLKNet``.

    Raises:
        ValueError: There is no such model.
    """
    variant = name.split(".")[0]
    if not timm.is_model(variant):
        close = difflib.get_close_matches(variant, [*list_models(), *timm.list_models()], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"there is no model {name!r}{hint} (replknet models lists the variants)")
    return timm.create_model(name, **kwargs)

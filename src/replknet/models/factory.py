"""Models by name, or from a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from replknet.models.checkpoint import Checkpoint, as_replknet, load_weights, read_checkpoint
from replknet.models.formats import architecture
from replknet.models.variants import ARCHITECTURES, PUBLISHED_FILES

_SIZES = ("kernels", "layers", "channels", "dw_ratio", "ffn_ratio")
_DEFAULTS = {"dw_ratio": 1.0, "ffn_ratio": 4.0}


def list_models() -> list[str]:
    """Names of the RepLKNet variants, also known to ``timm.create_model``."""
    return sorted(ARCHITECTURES)


def create_model(
    name: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    use_ema: bool | None = None,
    reset_head: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a RepLKNet variant, or any other model of timm; untrained, or from a file.

    With a checkpoint, what is not given is what the file says: form, number of classes, input
    channels, and for our own files also the name, all other arguments and the preprocessing
    (in ``model.pretrained_cfg``, where ``timm.data.resolve_data_config`` finds it). Of other
    files, the name and tag follow from the authors' file names, or the name from the sizes.

    Args:
        name: Variant, with a tag after a dot to choose its preprocessing
            ("replknet_31b.in1k_384"), or the name of another timm model.
        checkpoint: File of any format that ``load_checkpoint`` knows.
        use_ema: See ``load_checkpoint``.
        reset_head: See ``load_checkpoint``.
        kwargs: What ``timm.create_model`` takes: num_classes, in_chans, drop_path_rate,
            features_only, out_indices, and the arguments of ``RepLKNet``.

    Raises:
        ValueError: There is no such model, or the file is not one of it.
        FileNotFoundError, IsADirectoryError: There is no such file.
    """
    if checkpoint is None:
        if name is None:
            raise ValueError(f"name a model ({', '.join(list_models())}) or give a checkpoint")
        return _build(name, kwargs)
    found = read_checkpoint(checkpoint, use_ema=use_ema)
    name, kwargs = _described(found, name, kwargs)
    model = _build(name, kwargs)
    load_weights(model, found, reset_head=reset_head)
    # Already under timm's names; JSON made lists of the tuples.
    preprocessing = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in found.metadata.get("preprocessing", {}).items()
    }
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **preprocessing}
    return model


def _build(name: str, kwargs: dict[str, Any]) -> Any:
    """A timm model: a module with attributes, such as ``pretrained_cfg``, that no type tells."""
    variant = name.split(".")[0]
    if not timm.is_model(variant):
        close = difflib.get_close_matches(variant, [*list_models(), *timm.list_models()], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"there is no model {name!r}{hint} (replknet models lists the variants)")
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise ValueError(f"{name} cannot be built with {given}: {error}") from error


def _described(
    found: Checkpoint, name: str | None, kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the model in a file; what the caller gave comes first."""
    stored = found.metadata.get("model", {})
    if name is None:
        name = stored.get("name")
    if name is None or name.split(".")[0] in ARCHITECTURES:
        network = as_replknet(found)
        shown = architecture(network.state_dict)
        form = network.report.form
        name = name or PUBLISHED_FILES.get(found.report.path.stem) or _variant(shown, form)
        if name is None:
            sizes = ", ".join(f"{key} {shown[key]}" for key in _SIZES)
            raise ValueError(
                f"{found.report.path} holds a RepLKNet of no known variant ({sizes}); build "
                "RepLKNet with these arguments and call load_checkpoint"
            )
        file = {key: shown[key] for key in ("num_classes", "in_chans")}
        file |= {"form": form, "norm_intermediate_features": shown["norm_intermediate_features"]}
        kwargs = {**file, **kwargs}
    return name, {**stored_kwargs(found.metadata, name), **kwargs}


def stored_kwargs(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Arguments of the model ``name`` in the metadata of its file; not its form: weights tell it.

    There are none if the file is of another model, or not one of ours.
    """
    stored = metadata.get("model", {})
    if stored.get("name", "").split(".")[0] != name.split(".")[0]:
        return {}
    return {key: value for key, value in stored.get("kwargs", {}).items() if key != "form"}


def _variant(shown: dict[str, Any], form: str | None) -> str | None:
    """The variant that has the sizes of the tensors in a file, if any has."""
    keys = [*_SIZES, *(["small_kernel"] if form == "training" else [])]
    for name, arguments in ARCHITECTURES.items():
        if all(shown[key] == {**_DEFAULTS, **arguments}[key] for key in keys):
            return name
    return None


def describe_published(checkpoint: Checkpoint, name: str | None = None) -> dict[str, Any]:
    """Metadata, as our own files carry it, for a RepLKNet file that has none.

    Args:
        checkpoint: As ``read_replknet`` returns it.
        name: Variant with tag, for the preprocessing; by default what the file's name or the
            shapes of its weights tell, which is nothing for a network of no known variant.

    Raises:
        ValueError: ``name`` is no variant, or not one of the file's sizes.
    """
    path, form = checkpoint.report.path, checkpoint.report.form
    shown = architecture(checkpoint.state_dict)
    variant = _variant(shown, form)
    name = name or PUBLISHED_FILES.get(path.stem) or variant
    if name is None:
        return {}
    if variant != name.split(".")[0]:
        raise ValueError(f"{path} is not {name}: by its sizes it is {variant or 'no variant'}")
    kwargs = {key: shown[key] for key in ("num_classes", "in_chans", "norm_intermediate_features")}
    metadata: dict[str, Any] = {"model": {"name": name, "kwargs": kwargs}}
    if "." not in name:
        return metadata
    with torch.device("meta"):
        config = _build(name, {}).pretrained_cfg
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {**metadata, "preprocessing": {key: config[key] for key in keys}}

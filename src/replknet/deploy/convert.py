"""Weights files from any format and form of RepLKNet to any other."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from replknet.deploy.folding import fold_norm_after
from replknet.deploy.fuse import fuse
from replknet.deploy.reparameterize import reparameterize
from replknet.models import CheckpointReport, RepLKNet, save_checkpoint
from replknet.models.checkpoint import read_replknet
from replknet.models.factory import describe_published
from replknet.models.formats import StateDict, architecture
from replknet.models.replknet import Form
from replknet.models.writing import write_whole

FORMS: tuple[Form, ...] = ("training", "merged", "deep_fused", "fused")  # each less reversible


@dataclass(frozen=True)
class ConversionConfig:
    """What to convert to what.

    Attributes:
        source: File of any known format.
        target: File to write.
        layout: One of ``LAYOUTS``.
        form: Form of the network in the target; None keeps that of the source.
        use_ema: Which weights of a trainer file; None takes the averaged ones if there are any.
        model: Variant with tag, such as "replknet_31b.in1k_384", whose preprocessing goes into
            the target; for sources that are not this package's.
        overwrite: Whether an existing target may be replaced.
    """

    source: Path
    target: Path
    layout: str = "safetensors"
    form: Form | None = None
    use_ema: bool | None = None
    model: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Conversion:
    """What was read and written.

    Attributes:
        metadata: What the target says of itself; only safetensors files can.
        dropped: What the target's layout has no place for.
    """

    source: CheckpointReport
    target: Path
    layout: str
    form: Form
    size: int
    metadata: Mapping[str, Any]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            str(self.source),
            f"-> {self.target}",
            f"  format: {self.layout}",
            f"  form: {self.form}",
            f"  size: {self.size / 1e6:,.1f} MB",
        ]
        if model := self.metadata.get("model"):
            lines.append(f"  model: {model['name']}")
        if self.layout == "safetensors" and "preprocessing" not in self.metadata:
            lines.append(
                "  preprocessing: unknown; give it with --model, as in replknet_31b.in1k_384"
            )
        if self.dropped:
            lines.append(f"  without: {', '.join(self.dropped)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        source = {**asdict(self.source), "path": str(self.source.path)}
        return {**asdict(self), "source": source, "target": str(self.target)}


def convert_checkpoint(config: ConversionConfig) -> Conversion:
    """Write the RepLKNet of ``config.source`` in another layout, form, or both.

    Raises:
        FileExistsError: The target exists and ``overwrite`` is False.
        OSError: The target cannot be written; nothing is left of it.
        ValueError: The source is no RepLKNet, or cannot be brought to the layout or form.
    """
    _check_target(config)
    checkpoint = read_replknet(config.source, use_ema=config.use_ema)
    source_form = checkpoint.report.form or "training"
    form = config.form or source_form
    state = checkpoint.state_dict
    if form != source_form:
        state = change_form(state, source_form, form)
    metadata: Mapping[str, Any] = {}
    dropped: tuple[str, ...] = ()
    if config.layout == "safetensors":
        metadata = checkpoint.metadata or describe_published(checkpoint, config.model)
        save_checkpoint(config.target, state, metadata)
    else:
        content = LAYOUTS[config.layout](state)
        dropped = ("metadata",) if checkpoint.metadata else ()
        if config.layout == "backbone":
            dropped = (*dropped, "final norm and classifier")
        write_whole(config.target, lambda part: torch.save(content, part))
    return Conversion(
        source=checkpoint.report,
        target=config.target,
        layout=config.layout,
        form=form,
        size=config.target.stat().st_size,
        metadata=metadata,
        dropped=dropped,
    )


def change_form(state: StateDict, source: Form, target: Form) -> StateDict:
    """Weights of a RepLKNet, from one form to one further along ``FORMS``.

    Raises:
        ValueError: ``target`` is before ``source``: what was folded cannot be taken apart.
    """
    if FORMS.index(target) < FORMS.index(source):
        raise ValueError(
            f"the {source} form cannot be turned back into the {target} form: what was folded "
            "cannot be taken apart; convert the file that was trained"
        )
    sizes = architecture(state)
    model = RepLKNet(**sizes, form=source).eval()
    if sizes["num_classes"] == 0 and "norm.weight" not in state:
        model.norm = nn.Identity()
    model.load_state_dict(state)
    folded = fuse(model) if target == "fused" else model
    folded = reparameterize(folded)
    if target == "deep_fused":
        _fuse_units(folded)
    return folded.state_dict()


def _fuse_units(model: nn.Module) -> None:
    """Fold, in place, the batch norm of every conv-BN unit, and no other."""
    for unit in model.modules():
        parts = dict(unit.named_children())
        conv, bn = parts.get("conv"), parts.get("bn")
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
            fold_norm_after(conv, bn)
            unit.set_submodule("bn", nn.Identity())


def _check_target(config: ConversionConfig) -> None:
    if config.layout not in ("safetensors", *LAYOUTS):
        known = ", ".join(("safetensors", *LAYOUTS))
        raise ValueError(f"layout must be one of {known}, got {config.layout!r}")
    named = config.target.suffix == ".safetensors"
    if named != (config.layout == "safetensors"):
        raise ValueError(
            f"the name {config.target.name} does not go with the layout {config.layout}: "
            "safetensors files, and no others, end in .safetensors"
        )
    if config.target.exists() and not config.overwrite:
        raise FileExistsError(f"{config.target} exists; overwrite it with --overwrite")


def _prefixed(prefix: str, state: StateDict) -> StateDict:
    return {prefix + name: value for name, value in state.items()}


def _renamed_head(state: StateDict, new: str) -> StateDict:
    if "head.weight" not in state:
        raise ValueError(f"the source has no classifier, which this layout calls {new}")
    return {
        name.replace("head.", f"{new}.", 1) if name.startswith("head.") else name: value
        for name, value in state.items()
    }


def _trainer(state: StateDict) -> dict[str, Any]:
    """Both sets of weights are the same; there is no optimizer to continue from."""
    return {"model": state, "model_ema": state, "epoch": "best", "args": argparse.Namespace()}


def _mmpretrain(state: StateDict) -> dict[str, Any]:
    last = f"stages.{len(architecture(state)['layers']) - 1}.norm."
    if any(name.startswith(last) for name in state):
        raise ValueError("mmpretrain's names have no place for both the final norm and stage norms")
    names = {}
    for name, value in _renamed_head(state, "head.fc").items():
        moved = name.replace("norm.", last, 1) if name.startswith("norm.") else name
        names[moved if moved.startswith("head.") else f"backbone.{moved}"] = value
    return {"state_dict": names}


def _backbone(state: StateDict) -> dict[str, Any]:
    parts = ("stem.", "stages.", "transitions.")
    kept = {name: value for name, value in state.items() if name.startswith(parts)}
    return {"state_dict": _prefixed("backbone.", kept)}


LAYOUTS: dict[str, Callable[[StateDict], dict[str, Any]]] = {
    "bare": dict,
    "model": lambda state: {"model": state},
    "state_dict": lambda state: {"state_dict": state},
    "trainer": _trainer,
    "ddp": lambda state: _prefixed("module.", state),
    "22k": lambda state: {"model": _renamed_head(state, "head.cls_22k")},
    "mmpretrain": _mmpretrain,
    "backbone": _backbone,
}
"""What ``torch.save`` is given, by layout; "safetensors" is written otherwise."""

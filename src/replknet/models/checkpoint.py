"""Checkpoints: read any published format, load strictly, save our own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models import adapt_input_conv
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from replknet.models.formats import StateDict, architecture, form_of, translate, unwrap
from replknet.models.matching import Mismatch, compare, describe
from replknet.models.reading import METADATA_KEY, read_file
from replknet.models.replknet import Form, RepLKNet
from replknet.models.writing import write_whole

_STEM = "stem.0.conv.weight"


@dataclass(frozen=True)
class CheckpointReport:
    """What was found in a file, and what became of it.

    Attributes:
        path: The file.
        container: How the weights are wrapped: "safetensors", "bare", "{'model'}", ...
        form: Form of the RepLKNet; None for another kind of model.
        ema: Whether the averaged weights were taken.
        prefix: What stood before the names of the network, such as "backbone.".
        renamed: What was called otherwise, in words.
        num_classes: Outputs of the classifier in the file; None if it has none.
        ignored: Names of the file that were not used.
        initialized: Names of the model that keep their values, as the file has nothing for them.
        adapted: Tensors changed on the way, in words.
        metadata: Of our own files: task, model, preprocessing, class_names, metrics, version.
    """

    path: Path
    container: str
    form: Form | None
    ema: bool = False
    prefix: str = ""
    renamed: tuple[str, ...] = ()
    num_classes: int | None = None
    ignored: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        facts = {
            "format": self.container + (f", names begin with {self.prefix!r}" * bool(self.prefix)),
            "form": self.form,
            "weights": "averaged (EMA)" if self.ema else None,
            "classes": self.num_classes,
            "renamed": "; ".join(self.renamed),
            "adapted": "; ".join(self.adapted),
            "not used": _by_part(self.ignored),
            "left as initialised": _by_part(self.initialized),
        }
        for key in ("task", "model", "metrics", "version"):
            facts[key] = self.metadata.get(key)
        lines = [f"  {key}: {value}" for key, value in facts.items() if value not in (None, "")]
        return "\n".join([str(self.path), *lines])


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a file, under the names of ``RepLKNet`` where it holds one, and the report."""

    state_dict: StateDict
    report: CheckpointReport

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of our own files: task, model, preprocessing, class_names, metrics; else empty."""
        return self.report.metadata


def read_checkpoint(path: str | Path, *, use_ema: bool | None = None) -> Checkpoint:
    """Recognise a file and return its weights, as they are stored, on the CPU.

    Args:
        path: A .pth, .pt or .safetensors file; told apart by content.
        use_ema: True asks for averaged weights, False for the others; None takes the averaged
            ones where there are any.

    Raises:
        FileNotFoundError, IsADirectoryError: There is no such file.
        ValueError: It holds no weights, is damaged, or would run code when loaded.
    """
    path = Path(path)
    content, metadata = read_file(path)
    try:
        found = unwrap(content, use_ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    container = "safetensors" if path.suffix == ".safetensors" else found.container
    report = CheckpointReport(path, container, None, ema=found.ema, metadata=metadata)
    return Checkpoint(found.state_dict, report)


def read_replknet(path: str | Path, *, use_ema: bool | None = None) -> Checkpoint:
    """Like ``read_checkpoint``, with the names of ``RepLKNet``, whatever the file's layout.

    Raises:
        ValueError: The file holds no RepLKNet, besides the errors of ``read_checkpoint``.
    """
    return as_replknet(read_checkpoint(path, use_ema=use_ema))


def as_replknet(checkpoint: Checkpoint) -> Checkpoint:
    """The RepLKNet in a checkpoint, under the names of ``RepLKNet``.

    Raises:
        ValueError: There is none, or it lacks what every RepLKNet has.
    """
    try:
        found = translate(checkpoint.state_dict)
        architecture(found.state_dict)
    except ValueError as error:
        raise ValueError(f"{checkpoint.report.path}: {error}") from error
    head = found.state_dict.get("head.weight")
    report = replace(
        checkpoint.report,
        form=form_of(found.state_dict),
        prefix=found.prefix,
        renamed=found.renamed,
        num_classes=None if head is None else head.shape[0],
        ignored=found.ignored,
    )
    return Checkpoint(found.state_dict, report)


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    use_ema: bool | None = None,
    reset_head: bool = False,
) -> CheckpointReport:
    """Load a file of any known format into ``model``, completely or not at all.

    A RepLKNet, also one made with ``features_only=True``, takes every published layout; any
    other model takes a state dict of its own. A model without classifier leaves the file's
    unused; the norms of ``norm_intermediate_features`` keep their initial values if the file was
    trained without; the first convolution is adapted to another number of input channels. The
    report says so in each case; everything else must match.

    Args:
        model: Changed in place.
        path: See ``read_checkpoint``.
        use_ema: See ``read_checkpoint``.
        reset_head: Leave the classifier as it is: for fine-tuning on other classes.

    Raises:
        FileNotFoundError, IsADirectoryError: There is no such file.
        ValueError: The file cannot be read or does not fit, with all differences; the model is
            unchanged.
    """
    return load_weights(model, read_checkpoint(path, use_ema=use_ema), reset_head=reset_head)


def load_weights(
    model: nn.Module, checkpoint: Checkpoint, *, reset_head: bool = False
) -> CheckpointReport:
    """``load_checkpoint`` for a file that has been read already."""
    target = model.model if isinstance(model, FeatureGetterNet) else model
    if isinstance(target, RepLKNet):
        checkpoint = _fit(as_replknet(checkpoint), target, model is not target, reset_head)
    elif reset_head:
        checkpoint = _without_classifier(checkpoint, target)
    _check(checkpoint, target)
    target.load_state_dict(checkpoint.state_dict, strict=not checkpoint.report.initialized)
    return checkpoint.report


def _fit(checkpoint: Checkpoint, model: RepLKNet, features: bool, reset_head: bool) -> Checkpoint:
    """Leave out what the model has no use for, and note what the file has nothing for."""
    state, wanted = dict(checkpoint.state_dict), model.state_dict()
    unused = ["head."] if model.num_classes == 0 or reset_head else []
    if features:
        depth, stages = len(model.stages), len(architecture(state)["layers"])
        unused += ["norm.", *(f"stages.{i}." for i in range(depth, stages))]
        unused += [f"transitions.{i}." for i in range(depth - 1, stages)]
    ignored = [n for n in state if n not in wanted and n.startswith(tuple(unused))]
    absent: list[str] = []
    if reset_head:
        ignored += [n for n in state if n.startswith("head.") and n not in ignored]
        absent += ["head."] + ([] if "norm.weight" in state else ["norm."])
    if "stages.0.norm.weight" not in state:
        absent += [f"stages.{i}.norm." for i in range(len(model.stages))]
    for name in ignored:
        del state[name]
    initialized = [n for n in wanted if n not in state and n.startswith(tuple(absent))]
    adapted = []
    if _STEM in state and state[_STEM].shape[1] != model.in_chans:
        adapted.append(f"input channels {state[_STEM].shape[1]} -> {model.in_chans}")
        state[_STEM] = adapt_input_conv(model.in_chans, state[_STEM], state[_STEM].shape[1])
    report = replace(
        checkpoint.report,
        ignored=(*checkpoint.report.ignored, *ignored),
        initialized=tuple(initialized),
        adapted=tuple(adapted),
    )
    return Checkpoint(state, report)


def _without_classifier(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """Leave out the classifier of a timm model, and note that the model keeps its own."""
    heads = _classifiers(model)
    if not heads:
        raise ValueError(
            f"reset_head is for models that say what their classifier is (get_classifier), and "
            f"{type(model).__name__} does not; load it without reset_head"
        )
    state = {n: t for n, t in checkpoint.state_dict.items() if not n.startswith(heads)}
    report = replace(
        checkpoint.report,
        ignored=tuple(name for name in checkpoint.state_dict if name not in state),
        initialized=tuple(name for name in model.state_dict() if name.startswith(heads)),
    )
    return Checkpoint(state, report)


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """What the names of the tensors of a timm model's classifiers begin with."""
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return ()
    found = get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    return tuple(
        f"{name}." for name, module in model.named_modules() if any(module is h for h in heads)
    )


def _check(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse weights that do not fit ``model``, with the reason and the way out."""
    report, wanted = checkpoint.report, dict(model.state_dict())
    for name in report.initialized:
        del wanted[name]
    mismatch = compare(checkpoint.state_dict, wanted)
    if not mismatch:
        return
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    lines = [f"{report.path} does not fit the model {name}", _hint(checkpoint, model, mismatch)]
    lines += describe(mismatch, checkpoint.state_dict, wanted)
    raise ValueError("\n".join(line for line in lines if line))


def _hint(checkpoint: Checkpoint, model: nn.Module, mismatch: Mismatch) -> str:
    """Most likely cause of a mismatch and the way out; empty if there is no telling."""
    if not isinstance(model, RepLKNet):
        names = (*mismatch.missing, *mismatch.unexpected, *mismatch.reshaped)
        if not all(name.startswith(_classifiers(model)) for name in names):
            return ""
        return "the file has another classifier; pass reset_head=True to keep the model's own"
    state, wanted = checkpoint.state_dict, model.state_dict()
    file_form, form = form_of(state), form_of(wanted)
    if file_form != form:
        return (
            f"the file holds the {file_form} form, the model has the {form} form; build the model "
            f"with form={file_form!r}"
        )
    file, ours = architecture(state), architecture(wanted)
    different = [key for key in file if file[key] != ours[key]]
    if set(different) <= {"num_classes"} and not file["num_classes"]:
        return (
            "the file is a backbone without classifier; build the model with features_only=True, "
            "or pass reset_head=True to keep its own final norm and classifier"
        )
    if different == ["num_classes"]:
        return (
            f"the file has {file['num_classes']} classes, the model {ours['num_classes']}; build "
            f"it with num_classes={file['num_classes']}, or pass reset_head=True to keep its own "
            "classifier"
        )
    if different == ["norm_intermediate_features"]:
        return "the file has norms for features; pass norm_intermediate_features=True"
    values = ", ".join(f"{key} {file[key]} (model: {ours[key]})" for key in different)
    return f"the file holds another network: {values}" if values else ""


def save_checkpoint(
    path: str | Path, model: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write weights as safetensors, with ``metadata`` as JSON; atomic, replaces an older file.

    Args:
        path: Of a .safetensors file.
        model: A model or its state dict.
        metadata: JSON-serialisable; what is known of task, model {name, kwargs}, preprocessing,
            class_names and metrics. Version and form are added.

    Raises:
        OSError: The file cannot be written; an older one is as it was.
    """
    path = Path(path)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    known: dict[str, Any] = {"version": version("replknet")}
    if _STEM in state:
        known["form"] = form_of(state)
    text = json.dumps({**metadata, **known})
    tensors = {name: value.detach().contiguous() for name, value in state.items()}
    write_whole(path, lambda part: save_file(tensors, part, metadata={METADATA_KEY: text}))


def _by_part(names: tuple[str, ...]) -> str:
    parts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part} ({count} tensors)" for part, count in parts.items())

"""From a network, or a checkpoint, to a verified file for other engines."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replknet.deploy import plain
from replknet.deploy.packed import FrozenDepthwiseConv2d, PackedConv2d, PackedMLP
from replknet.export.formats import FORMATS, Format
from replknet.export.program import trace
from replknet.export.sources import SOURCES
from replknet.export.verification import LOGITS, Check, VerificationError, sample_images, verify
from replknet.tasks.classification.decoding import decode_image

PACKED_LAYERS = (FrozenDepthwiseConv2d, PackedConv2d, PackedMLP)
TOLERANCE = 1e-4
"""Largest difference of an output from the network's, in units of its spread."""


@dataclass(frozen=True)
class ExportConfig:
    """What to export to what.

    Attributes:
        checkpoint: File of any known format, in any form.
        output: File to write.
        format: One of ``FORMATS``.
        task: One of ``SOURCES``: the classifier, or the backbone below it.
        model: Variant with tag of a published file, such as "replknet_31b.in1k_384".
        input_size: Pixels; None for the checkpoint's. The file takes any size; this one is in its
            preprocessing and is what it is verified with.
        images: Image files to verify it with; none for some that come with the package.
        tolerance: See ``export``.
        overwrite: Whether an existing output may be replaced.
    """

    checkpoint: Path
    output: Path
    format: str
    task: str = "classification"
    model: str | None = None
    input_size: int | None = None
    images: tuple[str, ...] = ()
    tolerance: float = TOLERANCE
    overwrite: bool = False


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its results are from the network's.

    Attributes:
        engine: Name and version of the engine in which the file was verified.
        files: Names of the files that belong together, the one to open first.
        size: Of all files, in bytes.
    """

    path: Path
    format: str
    engine: str
    files: tuple[str, ...]
    size: int
    checks: tuple[Check, ...]

    @property
    def difference(self) -> float:
        """Largest absolute difference of an output."""
        return max(check.difference for check in self.checks)

    @property
    def relative(self) -> float:
        """Largest difference in units of the output's spread."""
        return max(check.relative for check in self.checks)

    def __str__(self) -> str:
        shapes = dict.fromkeys("x".join(map(str, check.shape)) for check in self.checks)
        outputs = dict.fromkeys(check.output for check in self.checks)
        return "\n".join(
            [
                str(self.path),
                f"  format: {self.format}",
                f"  size: {self.size / 1e6:,.1f} MB in {', '.join(self.files)}",
                f"  verified in: {self.engine}",
                f"  outputs: {', '.join(outputs)}",
                f"  on batches of: {', '.join(shapes)}",
                f"  largest difference: {self.difference:.1e} ({self.relative:.1e} of the spread)",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        summary = {"difference": self.difference, "relative": self.relative}
        return {**asdict(self), "path": str(self.path), **summary}


def export_checkpoint(config: ExportConfig) -> ExportReport:
    """Export the network of a checkpoint with its preprocessing; see ``export``.

    Raises:
        FileExistsError: The output exists and ``overwrite`` is False.
        ValueError: The checkpoint holds no network for the task, an image cannot be read, and what
            ``export`` raises.
    """
    if config.task not in SOURCES:
        raise ValueError(f"task must be one of {', '.join(SOURCES)}, got {config.task!r}")
    if config.output.exists() and not config.overwrite:
        raise FileExistsError(f"{config.output} exists; overwrite it with --overwrite")
    format_for(config.format, config.output)
    source = SOURCES[config.task](config.checkpoint, config.model, config.input_size)
    if config.images:
        transform, mode = source.preprocessing.eval_transform(), source.preprocessing.image_mode
        images = torch.stack([transform(decode_image(path, mode)) for path in config.images])
    else:
        images = sample_images(source.preprocessing)
    return export(
        source.network,
        config.output,
        config.format,
        images=images,
        outputs=source.outputs,
        metadata=source.metadata,
        tolerance=config.tolerance,
    )


def export(
    model: nn.Module,
    path: str | Path,
    format: str,
    *,
    images: Tensor,
    outputs: Sequence[str] = (LOGITS,),
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write ``model``, merged and fused, to a file that stock engines run, once it is verified.

    The file takes any batch and image size and holds standard operators alone. Before it gets its
    name it is run in its engine on ``images``, at their size and at two others, beside ``model``.

    Args:
        model: Network from one tensor to one or several, in any form, on the CPU in float32: a
            classifier, a feature extractor. It is not changed.
        path: Of the file; the suffix is the format's. A file that is there is replaced.
        format: "onnx", "openvino" (.xml, with a .bin beside it) or "torch-export" (.pt2).
        images: (N, C, H, W) as the model takes them, N >= 1: better real ones than noise.
        outputs: Names for the tensors that the model returns, in their order.
        metadata: JSON-serialisable, for whoever runs the file; see ``save_checkpoint``. Version
            and form are added.
        tolerance: Largest difference of an output, in units of its spread.

    Raises:
        ValueError: An argument does not fit, or a library is not installed.
        NotImplementedError: The network cannot be exported for any batch and image size.
        VerificationError: The file's results are not the network's; nothing is written.
        OSError: The file cannot be written, or there is no such folder.
    """
    path = Path(path)
    target = format_for(format, path)
    if images.ndim != 4 or images.dtype != torch.float32 or images.device.type != "cpu":
        raise ValueError(
            "images must be (N, C, H, W) of float32 on the CPU, got "
            f"{tuple(images.shape)} of {images.dtype} on {images.device}"
        )
    if any(isinstance(layer, PACKED_LAYERS) for layer in model.modules()):
        raise ValueError(
            "the network was optimized for this machine; export the one that it was made from"
        )
    known = {"version": version("replknet"), "form": "fused"}
    text = json.dumps({**(metadata or {}), **known})
    program = trace(plain(model), images)
    count = len(program.graph_signature.user_outputs)
    if count != len(outputs):
        raise ValueError(f"the network returns {count} tensors; outputs names {list(outputs)}")
    # A folder beside the target is on the same disk, so that files are moved as a whole.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder, path.name)
        target.write(program, draft, outputs, text)
        try:
            checks = verify(model, target.open(draft), images, tolerance, outputs)
        except VerificationError as error:
            raise VerificationError(
                f"{path} was not written: in {target.engine}, {error}"
            ) from None
        files = sorted(Path(folder).iterdir(), key=lambda file: file != draft)
        size = sum(file.stat().st_size for file in files)
        _install(files, path)
    engine = f"{target.engine} {version(target.engine)}"
    return ExportReport(path, format, engine, tuple(file.name for file in files), size, checks)


def format_for(format: str, path: Path) -> Format:
    """Look up a format, and see that it can be written to ``path`` here."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    target = FORMATS[format]
    if path.suffix != target.suffix:
        raise ValueError(f"files of the format {format} end in {target.suffix}, got {path.name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    target.require()
    return target


def _install(files: list[Path], path: Path) -> None:
    """Move files beside ``path``, that with its name last: it never meets another's weights."""
    for file in files:
        with file.open("rb+") as content:
            os.fsync(content.fileno())
    if len(files) > 1:
        path.unlink(missing_ok=True)
    for file in reversed(files):
        os.replace(file, path.with_name(file.name))

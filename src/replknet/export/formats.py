"""The files that a network can be exported to, and what each engine makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from replknet.export.engines import Run, open_onnxruntime, open_openvino, run_in_torch
from replknet.models.reading import METADATA_KEY

INPUT = "images"
OPSET = 18
"""Of ONNX; what PyTorch's translations are written for, and read by every engine since 2023."""


@dataclass(frozen=True)
class Format:
    """A kind of file: how it is written, and how it is run to verify it.

    Attributes:
        suffix: Of the file's name.
        libraries: Modules that writing and running need.
        write: Writes a program, with the names of its outputs and metadata as JSON, to a path.
        engine: Name of the engine that verifies it.
        open: Opens a file in that engine.
    """

    suffix: str
    libraries: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, Sequence[str], str], None]
    engine: str
    open: Callable[[Path], Run]

    def require(self) -> None:
        """Refuse to go on without the libraries.

        Raises:
            ValueError: Some are not installed.
        """
        if absent := [name for name in self.libraries if find_spec(name) is None]:
            raise ValueError(
                f"export to {self.suffix} files needs {', '.join(absent)}: "
                "pip install 'replknet[export]'"
            )


def write_onnx(program: ExportedProgram, path: Path, outputs: Sequence[str], metadata: str) -> None:
    """One file, weights included; metadata in ``metadata_props``."""
    result: Any = torch.onnx.export(
        program,
        (),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=outputs,
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
    )
    result.model.metadata_props[METADATA_KEY] = metadata
    result.save(path, external_data=False)


def write_openvino(
    program: ExportedProgram, path: Path, outputs: Sequence[str], metadata: str
) -> None:
    """Two files, ``path`` and its weights in a .bin beside it; metadata in ``rt_info``."""
    import openvino

    model = openvino.convert_model(program)
    channels = program.example_inputs[0][0].shape[1]
    model.reshape(openvino.PartialShape([-1, channels, -1, -1]))
    model.inputs[0].set_names({INPUT})
    for output, name in zip(model.outputs, outputs, strict=True):
        output.set_names({name})
    model.set_rt_info(metadata, METADATA_KEY)
    openvino.save_model(model, path, compress_to_fp16=False)


def write_torch_export(
    program: ExportedProgram, path: Path, outputs: Sequence[str], metadata: str
) -> None:
    """One file for ``torch.export.load``; metadata in ``extra_files``, outputs without names."""
    torch.export.save(program, path, extra_files={METADATA_KEY: metadata})


FORMATS = {
    "onnx": Format(
        ".onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        write_onnx,
        "onnxruntime",
        lambda path: open_onnxruntime(path)[0],
    ),
    "openvino": Format(
        ".xml", ("openvino",), write_openvino, "openvino", lambda path: open_openvino(path)[0]
    ),
    "torch-export": Format(".pt2", (), write_torch_export, "torch", run_in_torch),
}

"""An exported classifier, ready for ``predict``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from replknet.export.engines import Run, open_onnxruntime, open_openvino
from replknet.tasks.classification import Preprocessing
from replknet.tasks.classification.classifier import Classifier


@dataclass(frozen=True)
class Engine:
    """Runs files whose names end in ``suffixes``; ``library`` is the module that it needs."""

    library: str
    suffixes: tuple[str, ...]
    open: Callable[[Path], tuple[Run, str | None]]


ENGINES = {
    "onnxruntime": Engine("onnxruntime", (".onnx",), open_onnxruntime),
    "openvino": Engine("openvino", (".xml", ".onnx"), open_openvino),
}


def load_exported(path: str | Path, engine: str, *, input_size: int | None = None) -> Classifier:
    """Open a file written by ``replknet export`` in an engine, on the CPU.

    Args:
        path: An .onnx file, or an .xml file with its .bin beside it.
        engine: "onnxruntime" or "openvino" (which reads .onnx files too).
        input_size: Another size in pixels than that in the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The engine is not installed or cannot read the file, or the file is no
            classifier or does not say what its classes and preprocessing are.
    """
    path = Path(path)
    chosen = _engine(engine, path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        run, text = chosen.open(path)
    except Exception as error:  # each engine has its own kinds
        raise ValueError(f"{engine} cannot open {path}: {error}") from error
    metadata = {} if text is None else json.loads(text)
    if (task := metadata.get("task", "classification")) != "classification":
        raise ValueError(f"{path} holds a {task}, no classifier; predict runs classifiers")
    missing = [key for key in ("preprocessing", "class_names") if key not in metadata]
    if missing:
        raise ValueError(
            f"{path} does not say its {' and '.join(missing)}; write it with replknet export"
        )
    preprocessing = Preprocessing.from_dict(metadata["preprocessing"])
    if input_size is not None:
        preprocessing = preprocessing.resized(input_size)
    return Classifier(run, preprocessing, tuple(metadata["class_names"]), torch.device("cpu"))


def _engine(name: str, path: Path) -> Engine:
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    engine = ENGINES[name]
    if path.suffix not in engine.suffixes:
        raise ValueError(
            f"{name} runs {' and '.join(engine.suffixes)} files, got {path.name}; "
            "write one with replknet export"
        )
    if find_spec(engine.library) is None:
        raise ValueError(f"{name} is not installed: pip install 'replknet[export]'")
    return engine

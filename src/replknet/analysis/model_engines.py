"""The engines that ``replknet benchmark model`` compares: who runs a whole network."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from replknet.deploy import optimize, plain

Call: TypeAlias = Callable[[], Sequence[Tensor]]
"""Runs the network once; returns its outputs."""


@dataclass(frozen=True)
class ModelEngine:
    """Prepares a call of a network on one image batch; ``missing`` says why it cannot run."""

    name: str
    prepare: Callable[[nn.Module, Tensor], Call]
    missing: str = ""


def model_engines() -> dict[str, ModelEngine]:
    """Every engine by name; all but the last run the network's stock form."""
    engines = [
        ModelEngine("pytorch nchw", _pytorch(torch.contiguous_format)),
        ModelEngine("pytorch channels_last", _pytorch(torch.channels_last)),
        ModelEngine("torch.compile", _compiled),
        ModelEngine("onnxruntime", _onnxruntime, _missing("onnx", "onnxscript", "onnxruntime")),
        ModelEngine("openvino", _openvino, _missing("onnx", "onnxscript", "openvino")),
        ModelEngine("replknet", lambda model, image: torch_call(optimize(model), image)),
    ]
    return {engine.name: engine for engine in engines}


def torch_call(model: nn.Module, image: Tensor) -> Call:
    """Call of a PyTorch module, without gradients."""

    def call() -> Sequence[Tensor]:
        with torch.inference_mode():
            return _listed(model(image))

    return call


def _listed(outputs: Any) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _missing(*modules: str) -> str:
    absent = [name for name in modules if find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _pytorch(format: torch.memory_format) -> Callable[[nn.Module, Tensor], Call]:
    def prepare(model: nn.Module, image: Tensor) -> Call:
        network = plain(model).to(memory_format=format)
        return torch_call(network, image.contiguous(memory_format=format))

    return prepare


def _compiled(model: nn.Module, image: Tensor) -> Call:
    network = plain(model).to(memory_format=torch.channels_last)
    compiled: Any = torch.compile(network, dynamic=False, options={"freezing": True})
    return torch_call(compiled, image.contiguous(memory_format=torch.channels_last))


class _Listed(nn.Module):
    """A network whose outputs are a tuple, as an ONNX graph has them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(_listed(self.network(image)))


def _write_onnx(model: nn.Module, image: Tensor, folder: str) -> str:
    path = Path(folder, "model.onnx")
    network = _Listed(deepcopy(plain(model))).eval()
    torch.onnx.export(network, (image,), path, input_names=["image"], dynamo=True, verbose=False)
    return str(path)


def _onnxruntime(model: nn.Module, image: Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(
            _write_onnx(model, image, folder), options, providers=["CPUExecutionProvider"]
        )
    pixels = image.numpy()
    return lambda: _from_numpy(session.run(None, {"image": pixels}))


def _openvino(model: nn.Module, image: Tensor) -> Call:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        network = openvino.Core().read_model(_write_onnx(model, image, folder))
        compiled = openvino.Core().compile_model(
            network,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "f32",
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(image.numpy()))

    def call() -> Sequence[Tensor]:
        request.infer()
        return _from_numpy([output.data for output in request.output_tensors])

    return call


def _from_numpy(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]

"""Exported files, opened in the engines that run them on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from replknet.models.reading import METADATA_KEY


class Run(nn.Module):
    """A file in its engine, called like the network it was made from."""

    def __init__(self, run: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self._run = run

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Output, or list of several, for (N, C, H, W) of float32 on the CPU."""
        outputs = self._run(images.contiguous())
        return outputs[0] if len(outputs) == 1 else outputs


def open_onnxruntime(path: Path) -> tuple[Run, str | None]:
    """An .onnx file in ONNX Runtime, and the metadata of this package in it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]

    return Run(run), session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)


def open_openvino(path: Path) -> tuple[Run, str | None]:
    """An .xml or .onnx file in OpenVINO, and the metadata of this package in it."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    # Some processors would compute in bfloat16 by default.
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(model, "CPU", precision | threads)

    def run(images: Tensor) -> list[Tensor]:
        # The engine reuses the memory of its outputs.
        results = compiled(images.numpy())
        return [torch.from_numpy(results[output].copy()) for output in compiled.outputs]

    # Its reader of ONNX files puts their metadata under "framework".
    for place in ([METADATA_KEY], ["framework", METADATA_KEY]):
        if model.has_rt_info(place):
            return Run(run), model.get_rt_info(place).astype(str)
    return Run(run), None


def run_in_torch(path: Path) -> Run:
    """A .pt2 file in PyTorch."""
    module = torch.export.load(path).module()
    # The module refuses eval(), which a submodule would get.
    return Run(lambda images: pytree.tree_leaves(module(images)))

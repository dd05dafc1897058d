"""The engines that ``replknet benchmark op`` compares: who computes one depthwise convolution."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.deploy import optimize
from replknet.nn import DepthwiseConv2d
from replknet.ops import depthwise_conv2d, explain, problem_of
from replknet.ops.algorithm import ALGORITHMS

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One float32 convolution with "same" padding; sizes in pixels."""

    batch: int
    channels: int
    size: tuple[int, int]
    kernel_size: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.size
        kernel_h, kernel_w = self.kernel_size
        return f"{self.batch}x{self.channels}x{height}x{width} / {kernel_h}x{kernel_w}"

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros at the top and the left."""
        return self.kernel_size[0] // 2, self.kernel_size[1] // 2

    def operations(self) -> tuple[float, float]:
        """Nominal number of operations of a forward pass, and without those on padding.

        A multiplication and an addition are two.
        """
        planes = 2.0 * self.batch * self.channels
        nominal = planes * self.size[0] * self.size[1] * self.kernel_size[0] * self.kernel_size[1]
        taps = [_taps_on_the_map(*axis) for axis in zip(self.size, self.kernel_size, strict=True)]
        return nominal, planes * taps[0] * taps[1]


def _taps_on_the_map(size: int, kernel_size: int) -> int:
    """Along one axis, the number of pairs of an output and a tap that meets the map."""
    low = kernel_size // 2
    return sum(min(size, i - low + kernel_size) - max(0, i - low) for i in range(size))


@dataclass(frozen=True)
class Engine:
    """Prepares calls: ``forward`` alone, and ``train`` for forward and both gradients.

    ``train`` is None for engines that only infer; ``missing`` says why the engine cannot run.
    """

    name: str
    forward: Callable[[Case], Call]
    train: Callable[[Case], Call] | None = None
    missing: str = ""


def engines() -> dict[str, Engine]:
    """Every engine by name, those of PyTorch first and ours last."""
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    table = [
        _torch_engine("pytorch nchw", nchw, _conv2d),
        _torch_engine("pytorch channels_last", nhwc, _conv2d),
        Engine("onnxruntime", _onnxruntime, missing=_missing("onnx", "onnxruntime")),
        Engine("openvino", _openvino, missing=_missing("openvino")),
    ]
    for name in ALGORITHMS:
        if name not in ("torch", "triton"):  # listed above; not for the CPU
            table.append(_torch_engine(f"replknet {name}", nhwc, _ours(name)))
    table.append(_torch_engine("replknet nchw", nchw, _ours("auto")))
    table.append(_torch_engine("replknet channels_last", nhwc, _ours("auto")))
    table.append(Engine("replknet optimized", _optimized))
    return {engine.name: engine for engine in table}


def chosen_algorithms(case: Case) -> str:
    """What "auto" takes for channels_last, for the forward pass and the two gradients."""
    input, weight, _ = _tensors(case, torch.channels_last)
    return "/".join(
        str(explain(problem_of(input, weight, pass_=pass_)).choice)
        for pass_ in ("forward", "grad_input", "grad_weight")
    )


def _missing(*modules: str) -> str:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _conv2d(input: Tensor, weight: Tensor) -> Tensor:
    kernel_size = weight.shape[2:]
    padding = (kernel_size[0] // 2, kernel_size[1] // 2)
    return F.conv2d(input, weight, padding=padding, groups=weight.shape[0])


def _ours(algorithm: str) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(depthwise_conv2d, algorithm=algorithm)


def _optimized(case: Case) -> Call:
    """The layer for inference, whose filters are prepared once."""
    input, weight, _ = _tensors(case, torch.channels_last)
    conv = DepthwiseConv2d(
        case.channels, case.channels, case.kernel_size, padding=case.padding, bias=False
    )
    conv.weight.data = weight
    return partial(optimize(conv.requires_grad_(False)), input)


def _tensors(case: Case, format: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output; none of them wants a gradient."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(case.batch, case.channels, *case.size, generator=generator)
    weight = torch.randn(case.channels, 1, *case.kernel_size, generator=generator)
    input = input.contiguous(memory_format=format)
    return input, weight, torch.ones_like(input)


def _torch_engine(
    name: str, format: torch.memory_format, convolve: Callable[[Tensor, Tensor], Tensor]
) -> Engine:
    def forward(case: Case) -> Call:
        input, weight, _ = _tensors(case, format)
        return partial(convolve, input, weight)

    def train(case: Case) -> Call:
        input, weight, grad_output = _tensors(case, format)
        arguments = [input.requires_grad_(), weight.requires_grad_()]
        return lambda: torch.autograd.grad(convolve(input, weight), arguments, grad_output)

    return Engine(name, forward, train)


def _onnxruntime(case: Case) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    input, weight, _ = _tensors(case, torch.contiguous_format)
    (top, left), (kernel_h, kernel_w) = case.padding, case.kernel_size
    conv = helper.make_node(
        "Conv",
        ["input", "weight"],
        ["output"],
        group=case.channels,
        pads=[top, left, kernel_h - 1 - top, kernel_w - 1 - left],
    )
    shape = list(input.shape)
    graph = helper.make_graph(
        [conv],
        "convolution",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight.numpy(), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    binding.bind_cpu_input("input", input.numpy())
    binding.bind_output("output")

    def call() -> Any:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    return call


def _openvino(case: Case) -> Call:
    import openvino
    from openvino import opset8 as ops

    input, weight, _ = _tensors(case, torch.contiguous_format)
    (top, left), (kernel_h, kernel_w) = case.padding, case.kernel_size
    parameter = ops.parameter(list(input.shape), np.float32)
    filters = ops.constant(weight.numpy()[:, :, None])  # (groups, out, in, Kh, Kw)
    output = ops.group_convolution(
        parameter,
        filters,
        [1, 1],
        [top, left],
        [kernel_h - 1 - top, kernel_w - 1 - left],
        [1, 1],
    )
    compiled = openvino.Core().compile_model(
        openvino.Model([output], [parameter]),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(input.numpy()))
    return request.infer

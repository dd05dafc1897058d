"""Count what a network computes, by kind of operation, and sum it up as the tables do.

One multiply-add is one FLOP, as in the paper. A convention says which kinds are counted.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from replknet.models.replknet import Form

aten = torch.ops.aten


@dataclass(frozen=True)
class Convention:
    """Which operations count, how often, and in which form RepLKNet is built for it."""

    name: str
    form: Form
    weights: Mapping[str, int]

    def total(self, operations: Mapping[str, int]) -> int:
        """FLOPs of what ``count_operations`` found."""
        return sum(weight * operations.get(kind, 0) for kind, weight in self.weights.items())


CLASSIFICATION = Convention(
    "classification",
    "deep_fused",
    {"convolution": 1, "deconvolution": 1, "linear": 1, "matmul": 1},
)
"""Table 6: the products of the merged network with its conv-BN units fused, nothing else."""

DENSE_PREDICTION = Convention(
    "dense prediction",
    "deep_fused",
    {"convolution": 1, "convolution_bias": 1, "deconvolution": 1, "linear": 1, "relu": 1},
)
"""Tables 7 to 9: the backbone alone is fused; norms, GELU and interpolation are not counted."""

MMPRETRAIN = Convention("mmpretrain", "training", {"convolution": 1, "batch_norm": 5, "pool": 1})
"""What mmpretrain states for its port; the classifier is not counted."""


def count_flops(
    model: nn.Module, input_size: Sequence[int], convention: Convention = CLASSIFICATION
) -> int:
    """FLOPs of ``model``, in the form it has, on one input of size (N, C, H, W)."""
    return convention.total(count_operations(model, torch.empty(*input_size, device="meta")))


def count_operations(model: nn.Module, *inputs: Any) -> Counter[str]:
    """Count the operations of ``model(*inputs)`` in evaluation mode, without computing anything.

    Keys: "convolution", "deconvolution", "linear" and "matmul" count multiply-adds;
    "convolution_bias", "deconvolution_bias", "linear_bias", "relu", "gelu", "batch_norm",
    "layer_norm", "group_norm" and "softmax" count elements of the output, and "pool" those of the
    input. ``inputs`` may be tensors on any device; only their shapes are used.
    """
    twin = _on_meta(model).eval()
    to_meta = [i.to("meta") if isinstance(i, Tensor) else i for i in inputs]
    counter = _Counter()
    with torch.no_grad(), counter:
        twin(*to_meta)
    return counter.operations


def _on_meta(model: nn.Module) -> nn.Module:
    """Copy of a model without its weights."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"))
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        output = func(*args, **kwargs)
        if isinstance(func, OpOverload):
            self.operations.update(_count(func.overloadpacket, args, kwargs, output))
        return output


def _count(packet: OpOverloadPacket, args: tuple, kwargs: dict, output: Any) -> dict[str, int]:
    if packet in _BY_ELEMENT:
        kind, measured = _BY_ELEMENT[packet]
        return {kind: measured(args, output)}
    if packet not in flop_registry:
        return {}
    kind = _product(packet, args)
    counts = {kind: flop_registry[packet](*args, **kwargs, out_val=output) // 2}
    if packet is aten.addmm or (packet in _CONVOLUTIONS and args[2] is not None):
        counts[f"{kind}_bias"] = output.numel()
    if packet is torch.ops.replknet.depthwise_conv2d and args[6]:
        counts["relu"] = output.numel()
    return counts


_CONVOLUTIONS = (aten.convolution, torch.ops.replknet.depthwise_conv2d)


def _product(packet: OpOverloadPacket, args: tuple) -> str:
    if packet in _CONVOLUTIONS:
        transposed = packet is aten.convolution and args[6]
        return "deconvolution" if transposed else "convolution"
    return "linear" if packet in (aten.mm, aten.addmm) else "matmul"


def _of_input(args: tuple, output: Any) -> int:
    return args[0].numel()


def _of_output(args: tuple, output: Any) -> int:
    return (output[0] if isinstance(output, tuple) else output).numel()


_BY_ELEMENT: dict[OpOverloadPacket, tuple[str, Callable[[tuple, Any], int]]] = {
    aten.relu: ("relu", _of_output),
    aten.relu_: ("relu", _of_output),
    aten.gelu: ("gelu", _of_output),
    aten._softmax: ("softmax", _of_output),
    aten.native_batch_norm: ("batch_norm", _of_output),
    aten._native_batch_norm_legit_no_training: ("batch_norm", _of_output),
    aten.native_layer_norm: ("layer_norm", _of_output),
    aten.native_group_norm: ("group_norm", _of_output),
    aten.mean: ("pool", _of_input),
    aten._adaptive_avg_pool2d: ("pool", _of_input),
    aten.avg_pool2d: ("pool", _of_input),
    aten.max_pool2d_with_indices: ("pool", _of_input),
}

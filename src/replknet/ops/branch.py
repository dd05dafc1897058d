"""What a residual block adds to its input in training, as data, and by PyTorch's functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.ops.depthwise import depthwise_conv2d
from replknet.ops.eager import is_ordinary


class Statistics(NamedTuple):
    """What a batch norm keeps from step to step, and how it moves."""

    mean: Tensor | None
    variance: Tensor | None
    batches: Tensor | None
    momentum: float
    eps: float

    def suits_native(self) -> bool:
        dtypes = (torch.float32, torch.float32, torch.int64)
        given = [(t, dtype) for t, dtype in zip(self[:3], dtypes, strict=True) if t is not None]
        return all(
            is_ordinary(t) and t.is_cpu and t.is_contiguous() and t.dtype == dtype
            for t, dtype in given
        )


@dataclass(frozen=True)
class Branch:
    """What a residual block adds to ``x`` (N, C, H, W), images each by its scale:

    ``norm(second(inside(activation(norm(first(norm(x)))))))``, norms by the batch's statistics.
    Inside is nothing, or the ReLU of a depthwise convolution and its norm, or of the sum of two.
    """

    first: Tensor
    """Weight (width, channels, 1, 1)."""
    second: Tensor
    """Weight (channels, width, 1, 1)."""
    kernels: tuple[Tensor, ...]
    """Weights (width, 1, K, K) of the depthwise convolutions, which keep the size of the map."""
    norms: tuple[tuple[Tensor, Tensor], ...]
    """Weight and bias of each norm, in the order of the computation."""
    statistics: tuple[Statistics, ...]
    activation: Literal["relu", "gelu"]
    image_scales: Tensor | None = None
    """(N, 1, 1, 1), such as those of stochastic depth; ones if None."""

    @property
    def parameters(self) -> list[Tensor]:
        of_norms = (tensor for norm in self.norms for tensor in norm)
        return [self.first, self.second, *self.kernels, *of_norms]

    def of(self, parameters: Iterable[Tensor]) -> Branch:
        """The branch with other tensors, the next ones, in the places of ``parameters``."""
        first, second, *rest = islice(parameters, len(self.parameters))
        kernels, norms = rest[: len(self.kernels)], rest[len(self.kernels) :]
        pairs = tuple(zip(norms[::2], norms[1::2], strict=True))
        return replace(self, first=first, second=second, kernels=tuple(kernels), norms=pairs)


def gradients_by_pytorch(
    x: Tensor, branches: Sequence[Branch], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the input and the parameters, with a graph of their own if that is wanted."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: blocks may share a parameter, and each returns its part of the gradient.
        tensors = (x, *(parameter for branch in branches for parameter in branch.parameters))
        sources = [tensor.view_as(tensor) for tensor in tensors]
        x, *parameters = sources
        output, rest = x, iter(parameters)
        for branch in branches:
            output = output + layer_by_layer(output, branch.of(rest))
    wanted = [source for source in sources if source.requires_grad]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=create_graph))
    return tuple(next(grads) if source.requires_grad else None for source in sources)


def layer_by_layer(x: Tensor, branch: Branch) -> Tensor:
    """The branch of ``x`` by PyTorch's functions, without moving statistics."""

    def norm(i: int, x: Tensor) -> Tensor:
        weight, bias = branch.norms[i]
        eps = branch.statistics[i].eps
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    activate = F.gelu if branch.activation == "gelu" else F.relu
    x = activate(norm(1, F.conv2d(norm(0, x), branch.first)))
    if branch.kernels:
        convolved = [
            norm(2 + i, depthwise_conv2d(x, weight)) for i, weight in enumerate(branch.kernels)
        ]
        x = F.relu(sum(convolved[1:], convolved[0]))
    x = norm(-1, F.conv2d(x, branch.second))
    return x if branch.image_scales is None else x * branch.image_scales

"""Does a transformed model still compute the same function, and what was saved?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from replknet.deploy.folding import NORMS


@dataclass(frozen=True)
class Size:
    """What a model consists of."""

    parameters: int
    convolutions: int
    norms: int


@dataclass(frozen=True)
class Equivalence:
    """How far the outputs of two models differ on the same input.

    ``spread`` is the standard deviation of the reference's outputs; ``difference`` is the largest
    absolute difference. ``agreement`` is the fraction of positions at which the largest value
    along dimension 1 (the class, for logits and for segmentation) is at the same index.
    """

    difference: float
    spread: float
    agreement: float
    before: Size
    after: Size

    @property
    def relative(self) -> float:
        """Largest difference in units of the spread; NaN if an output is not finite."""
        return self.difference / self.spread if self.spread else self.difference


@torch.no_grad()
def compare(reference: nn.Module, model: nn.Module, *inputs: Any) -> Equivalence:
    """Run two models, in evaluation mode, on the same inputs and compare all their outputs.

    Outputs may be tensors or nested containers of tensors (feature lists, dictionaries). Neither
    model is changed: one in training mode is put back into it.

    Raises:
        ValueError: The outputs have different structures or shapes, or hold no numbers.
    """
    expected, actual = evaluate(reference, *inputs), evaluate(model, *inputs)
    difference, spread, agreement = compare_outputs(expected, actual)
    return Equivalence(difference, spread, agreement, before=size(reference), after=size(model))


def compare_outputs(expected: Any, actual: Any) -> tuple[float, float, float]:
    """Largest difference, spread of what is expected, and agreement, as in ``Equivalence``.

    Raises:
        ValueError: See ``compare``.
    """
    wanted, wanted_structure = pytree.tree_flatten(expected)
    found, structure = pytree.tree_flatten(actual)
    shapes = [tuple(output.shape) for output in wanted]
    other_shapes = [tuple(output.shape) for output in found]
    if wanted_structure != structure or shapes != other_shapes:
        raise ValueError(f"outputs cannot be compared: shapes {shapes} against {other_shapes}")
    if not any(output.numel() for output in wanted):
        raise ValueError("outputs cannot be compared: they hold no numbers; pass a larger input")
    pairs = list(zip(found, wanted, strict=True))
    return (
        _joined([a.double() - b.double() for a, b in pairs]).abs().max().item(),
        _joined(wanted).std(correction=0).item(),
        _joined([_classes(a) == _classes(b) for a, b in pairs]).mean().item(),
    )


@torch.no_grad()
def evaluate(model: nn.Module, *inputs: Any) -> Any:
    """Outputs of ``model`` in evaluation mode, in whichever mode it is and stays."""
    training = [module for module in model.modules() if module.training]
    try:
        return model.eval()(*inputs)
    finally:
        for module in training:
            module.training = True


def size(model: nn.Module) -> Size:
    """Count parameters, convolutions and batch norms."""
    return Size(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        convolutions=sum(isinstance(module, nn.Conv2d) for module in model.modules()),
        norms=sum(
            isinstance(module, (nn.modules.batchnorm._BatchNorm, *NORMS))
            for module in model.modules()
        ),
    )


def _classes(output: Tensor) -> Tensor:
    return output.argmax(min(1, output.ndim - 1))


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])

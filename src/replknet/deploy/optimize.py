"""Make a trained network fast on this machine, without changing what it computes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from replknet.deploy.arena import consolidate
from replknet.deploy.equivalence import compare
from replknet.deploy.folding import NORMS, is_watched
from replknet.deploy.fuse import fuse
from replknet.deploy.packed import (
    FrozenDepthwiseConv2d,
    PackedConv2d,
    PackedMLP,
    PackedProduct,
)
from replknet.deploy.reach import reached
from replknet.deploy.reparameterize import reparameterize
from replknet.deploy.replacement import (
    obstacle,
    replace_between_stages,
    replace_in_sequence,
    replacement,
)
from replknet.models.replknet import RepLKNet
from replknet.nn.norm import is_sequential
from replknet.ops.packed_pointwise import why_not_native

TOLERANCE = 1e-3
"""Largest difference that ``example_input`` may show, in units of the outputs' spread."""


@torch.inference_mode(False)
@torch.no_grad()
def optimize(model: nn.Module, example_input: Tensor | None = None) -> nn.Module:
    """Return a copy of ``model`` for inference on this machine: same calls, same results.

    Branches are merged and batch norms folded (``reparameterize``, ``fuse``). Then 1x1
    convolutions, MLPs and depthwise convolutions become layers with packed weights, cached filter
    spectra, and bias, activation and residual folded in; feature maps are channels_last inside and
    in the result. Works on RepLKNet in every form (classifier, ``features_only``, backbone with
    stage norms) and on any other network, of which ``optimization_report`` says what was left
    alone.

    The result takes any batch and image size, is deterministic, may be called from many threads,
    copied and pickled. It cannot be trained. Where the native kernels cannot run (another device or
    dtype) a warning says why, and the folded network is returned.

    Args:
        model: Network in any form; it is not changed.
        example_input: Input on which the result is compared with the model.

    Raises:
        RuntimeError: The results on ``example_input`` differ by more than 1e-3 of their spread.
    """
    fast = fuse(reparameterize(model))
    for tensor in chain(fast.parameters(), fast.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    weight = next(fast.parameters(), None)
    reason = "" if weight is None else why_not_native(weight.detach())
    if reason:
        warnings.warn(f"optimize keeps PyTorch's own layers: {reason}", stacklevel=2)
    else:
        fast = _replace(fast, reached(fast), {})
        consolidate(
            layer
            for layer in fast.modules()
            if isinstance(layer, (PackedProduct, FrozenDepthwiseConv2d))
        )
    fast.requires_grad_(False)
    if example_input is not None:
        _check(model, fast, example_input)
    return fast


def _replace(
    module: nn.Module, in_parts: set[nn.Module], done: dict[nn.Module, nn.Module]
) -> nn.Module:
    """``module`` with all that can be replaced replaced; shared modules stay shared.

    Those of ``in_parts`` keep their parts as they are.
    """
    if module in done:
        return done[module]
    stays = module in in_parts or any(map(is_watched, module.modules()))
    new = None if stays else replacement(module)
    done[module] = module if new is None else new.eval()
    if new is None:
        if is_sequential(module) and not (module in in_parts or is_watched(module)):
            replace_in_sequence(module, in_parts)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _replace(child, in_parts, done)
        if isinstance(module, RepLKNet):
            replace_between_stages(module)
    return done[module]


def _check(model: nn.Module, fast: nn.Module, example_input: Tensor) -> None:
    result = compare(model, fast, example_input)
    if not result.relative <= TOLERANCE:
        raise RuntimeError(
            f"the optimized network differs from the model by {result.relative:.1e} of the spread "
            f"of its outputs, more than {TOLERANCE:.0e}; use fuse(reparameterize(model)) instead"
        )


@dataclass(frozen=True)
class OptimizationReport:
    """Layers of an optimized network: those that were replaced, and why not the others."""

    replaced: tuple[str, ...]
    left_alone: dict[str, str]

    def __str__(self) -> str:
        total = len(self.replaced) + len(self.left_alone)
        lines = [f"{len(self.replaced)} of {total} layers replaced by inference layers"]
        lines += [f"  {name}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines)


def optimization_report(model: nn.Module) -> OptimizationReport:
    """Say which layers of the result of ``optimize`` are inference layers, and why not the rest."""
    replaced, left_alone, in_parts = [], {}, reached(model)
    for name, module in model.named_modules():
        if isinstance(module, (PackedConv2d, PackedMLP, FrozenDepthwiseConv2d)):
            replaced.append(name)
        elif isinstance(module, nn.Conv2d):
            used = "is used by its owner in another way than by a call"
            why = obstacle(module) or (used if module in in_parts else "of another device or dtype")
            left_alone[name] = f"convolution {why}"
        elif isinstance(module, (_BatchNorm, *NORMS)):
            left_alone[name] = "batch norm that no neighbour absorbs"
        elif isinstance(module, (nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)):
            left_alone[name] = f"{type(module).__name__} runs in PyTorch"
    return OptimizationReport(tuple(replaced), left_alone)

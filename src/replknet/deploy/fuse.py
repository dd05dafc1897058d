"""Fold every batch norm that can be folded into the convolution or linear layer next to it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import fx, nn

from replknet.deploy.folding import (
    NORMS,
    fold_norm_after,
    fold_norm_before,
    is_convolution,
    is_linear,
    is_norm,
    is_plain_norm,
    neutralize,
    norm_tail,
)
from replknet.deploy.reach import reached
from replknet.deploy.trace import Region, only_input, trace_regions

_SPATIAL_DIMS = ((2, 3), (3, 2), (-2, -1), (-1, -2), [2, 3], [3, 2], [-2, -1], [-1, -2])

Why: TypeAlias = str
"""The reason a norm is not folded, as the end of the sentence "left alone because ..."."""


def fuse(model: nn.Module) -> nn.Module:
    """Return a copy of ``model``, in evaluation mode, with its batch norms folded away.

    Folded exactly: a norm after a convolution; a norm before an unpadded convolution; a norm
    before (average pooling and) a linear layer. Every other norm stays, see ``unfused``. Works on
    any module; parameter names, dtypes, devices and requires-grad flags stay, a folded layer gains
    a bias. What is kept is the function ``model(x)`` with the default value of every other
    argument: a fused classifier no longer has its normalised features, so build a feature
    extractor first and fuse that. Idempotent, and commutes with ``reparameterize``.
    """
    fused = copy.deepcopy(model).eval()
    _fold_all(fused)
    return fused


def unfused(model: nn.Module) -> dict[str, Why]:
    """Batch norms that ``fuse(model)`` leaves in place, each with the reason."""
    return _fold_all(copy.deepcopy(model).eval())


@torch.no_grad()
def _fold_all(model: nn.Module) -> dict[str, Why]:
    """Fold in place; return the norms that remain, with the reasons."""
    regions = list(trace_regions(model))
    network = _Network(model, regions)
    remaining: dict[str, Why] = {}
    for region in regions:
        remaining |= _fold_region(region, network)
    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, *NORMS)) and name not in remaining:
            traced = name in network.calls
            kind = type(module).__name__
            remaining[name] = f"{kind} is not supported" if traced else "no traced forward calls it"
    return remaining


class _Network:
    """What must be known of the whole model before a module may be changed."""

    def __init__(self, model: nn.Module, regions: list[Region]) -> None:
        self.model = model
        self.in_parts = reached(model)
        self.calls: Counter[str] = Counter()
        self.read: set[str] = set()  # modules whose parameters are used other than by a call
        for region in regions:
            for node in region.graph.nodes:
                if node.op == "call_module":
                    self.calls[region.name(node)] += 1
                elif node.op == "get_attr":
                    self.read.add(region.name(node).rpartition(".")[0])
        holders = Counter(
            id(part)
            for module in model.modules()
            for part in (*module._parameters.values(), *module._modules.values())
        )
        self.shared = {part for part, count in holders.items() if count > 1}

    def obstacle(self, *names: str) -> Why | None:
        """Why the parameters of these modules must not be changed, if so."""
        for name in names:
            if name in self.read:
                return f"the parameters of {name} are also used directly"
            module = self.model.get_submodule(name)
            if is_norm(module) and module in self.in_parts:
                return f"a forward uses {name} in another way than by a call"
            if any(id(part) in self.shared for part in (module, *module.parameters())):
                return f"{name} or its parameters have a second name"
        return None


def _fold_region(region: Region, network: _Network) -> dict[str, Why]:
    remaining: dict[str, Why] = {}
    for name, nodes in _norm_calls(region):
        why = _fold_into_producer(region, network, name, nodes)
        if why is not None:
            remaining[name] = why
    # Backwards, so that a chain of norms moves into the layer at its end one after the other.
    for name, nodes in reversed(list(_norm_calls(region))):
        why = _fold_into_consumer(region, network, name, nodes)
        if why is None:
            remaining.pop(name, None)
        elif name in remaining:
            remaining[name] += f", and {why}"
    return remaining


def _norm_calls(region: Region) -> Iterator[tuple[str, list[fx.Node]]]:
    """Supported or not, every norm of a region with its calls, in order of the first call."""
    calls: dict[str, list[fx.Node]] = {}
    for node in region.graph.nodes:
        if node.op == "call_module" and isinstance(region.called(node), NORMS):
            calls.setdefault(region.name(node), []).append(node)
    yield from calls.items()


def _fold_into_producer(
    region: Region, network: _Network, name: str, nodes: list[fx.Node]
) -> Why | None:
    """Fold the norm into the convolution in front of it, or say why not."""
    norm = region.called(nodes[0])
    if not is_norm(norm):
        return "it has no running statistics, is watched or parametrized, or is of an unknown class"
    producers = [producer for node in nodes if (producer := only_input(node)) is not None]
    layers = {region.called(producer) for producer in producers}
    layer = layers.pop() if len(layers) == 1 and len(producers) == len(nodes) else None
    if not is_convolution(layer):
        return "its input is not the output of one convolution"
    layer_name = region.name(producers[0])
    if not network.calls[layer_name] == network.calls[name] == len(nodes):
        return f"{layer_name} and it are not always called together"
    if any(len(producer.users) != 1 for producer in producers):
        return f"the output of {layer_name} has other consumers"
    if why := network.obstacle(layer_name, name):
        return why
    fold_norm_after(layer, norm)
    _remove(region, norm, nodes)
    return None


def _fold_into_consumer(
    region: Region, network: _Network, name: str, nodes: list[fx.Node]
) -> Why | None:
    """Fold the norm into the layer that consumes its output, or say why not."""
    norm = region.called(nodes[0])
    if not is_plain_norm(norm):
        return "it does more than normalise with running statistics"
    channels = norm.running_mean.numel()  # type: ignore[union-attr]
    consumer = _linear_consumer(region, nodes[0], channels)
    if isinstance(consumer, str):
        return consumer
    layer, layer_name = region.called(consumer), region.name(consumer)
    if not network.calls[layer_name] == network.calls[name] == 1:
        return f"it and {layer_name} are not called exactly once"
    if region.overwrites_after(nodes, consumer):
        return f"a tensor is overwritten between it and {layer_name}"
    if why := network.obstacle(name, layer_name):
        return why
    fold_norm_before(layer, norm)  # type: ignore[arg-type]
    _remove(region, norm, nodes)
    return None


def _linear_consumer(region: Region, node: fx.Node, channels: int) -> fx.Node | Why:
    """Follow the norm's output, through averages, to a layer that can absorb the norm."""
    flat = False
    while True:
        if len(node.users) != 1:
            return f"its output has {len(node.users)} consumers"
        user = next(iter(node.users))
        if user.op == "output":
            return "its output is returned"
        module = region.called(user)
        if is_linear(module) and flat and module.in_features == channels:
            return user
        if is_convolution(module) and not flat and only_input(user) is node:
            name = region.name(user)
            return user if _is_unpadded(module) else f"{name} pads what it normalises"
        averaged = _flat_after(region, user, flat)
        if averaged is None or user.args[0] is not node:
            return f"its consumer, {user.target}, is no convolution or linear layer"
        node, flat = user, averaged


def _flat_after(region: Region, node: fx.Node, flat: bool) -> bool | None:
    """Whether the channels come last after ``node``; None unless it only averages or reshapes.

    An average commutes with an affine map of each channel, as its weights sum to one.
    """
    module = region.called(node)
    if isinstance(module, nn.AdaptiveAvgPool2d) or node.target is F.adaptive_avg_pool2d:
        return None if flat else False
    if isinstance(module, nn.AvgPool2d):
        whole = module.padding in (0, (0, 0)) and module.divisor_override is None
        return False if whole and not flat else None
    if isinstance(module, nn.Flatten):
        return True if (module.start_dim, module.end_dim) == (1, -1) else None
    if node.target in (torch.flatten, "flatten"):
        return True if node.args[1:] == (1,) and not node.kwargs else None
    if node.target in (torch.mean, "mean"):
        names = ("dim", "keepdim")
        arguments = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        spatial = arguments.get("dim") in _SPATIAL_DIMS
        return not arguments.get("keepdim", False) if spatial and not flat else None
    return None


def _is_unpadded(convolution: nn.Conv2d) -> bool:
    padding, size = convolution.padding, convolution.kernel_size
    return padding in ("valid", (0, 0)) or (padding == "same" and size == (1, 1))


def _remove(region: Region, norm: nn.BatchNorm2d, nodes: list[fx.Node]) -> None:
    """Replace a folded norm by what remains of it, in the model and in the graph."""
    neutralize(norm)  # a list may hold it, too
    tail = norm_tail(norm).eval()
    region.module.set_submodule(str(nodes[0].target), tail)
    if isinstance(tail, nn.Identity):
        for node in nodes:
            node.replace_all_uses_with(only_input(node))  # type: ignore[arg-type]
            region.graph.erase_node(node)

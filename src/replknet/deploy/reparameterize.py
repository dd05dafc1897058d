"""Merge parallel convolutions whose outputs are summed into one convolution."""

from __future__ import annotations

import copy
import functools
import operator
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import fx, nn

from replknet.deploy.branches import Branch, merge_branches, mergeable
from replknet.deploy.folding import is_convolution, is_plain_norm, is_watched
from replknet.deploy.reach import reached
from replknet.deploy.trace import Region, only_input, takes_one_input, trace
from replknet.nn import ReparamLargeKernelConv
from replknet.nn.norm import is_sequential

_ADDITIONS = (operator.add, torch.add, "add")
_MERGED_NAME = "reparam_conv"


def reparameterize(model: nn.Module) -> nn.Module:
    """Return a copy of ``model``, in evaluation mode, with parallel branches merged.

    A sum of branches of one input, each a convolution, a batch norm or a convolution and a batch
    norm, becomes one convolution whose kernel covers all of theirs (paper, section 3,
    guideline 3). Kernel sizes and dilations may differ; stride, groups and output size must
    agree. An identity shortcut in such a sum is merged too; whatever does not follow the pattern
    stays, and so does a module that its owner uses in parts. RepLKNet's large kernels keep their
    class and take the names of the merged checkpoints; another module that sums branches becomes a
    ``torch.fx.GraphModule`` of the rest of its forward, with a child ``reparam_conv``. Idempotent,
    and commutes with ``fuse``.
    """
    merged = copy.deepcopy(model).eval()
    in_parts = reached(merged)
    done: dict[nn.Module, nn.Module] = {}
    # Children first, and under every name of a shared module.
    for name, module in reversed(list(merged.named_modules(remove_duplicate=False))):
        if module not in done:
            done[module] = module if module in in_parts else _merge(module)
        if done[module] is not module and name:
            merged.set_submodule(name, done[module])
    return done[merged]


@torch.no_grad()
def _merge(module: nn.Module) -> nn.Module:
    """``module`` itself, or a new module with the branches that its own forward sums merged."""
    if is_watched(module):
        return module
    if isinstance(module, ReparamLargeKernelConv):
        return _merge_large_kernel(module)
    parts = sum(is_convolution(part) or is_plain_norm(part) for part in module.modules())
    may_sum = parts > 1 and not is_sequential(module)
    region = trace(module) if may_sum and takes_one_input(module) else None
    if region is None:
        return module
    sums = [node for node in region.graph.nodes if _is_whole_sum(region, node)]
    merged = [_merge_sum(region, node) for node in sums]
    if not any(merged):
        return module
    graph = fx.Graph()  # a plain one: it must not need this package's tracer to be unpickled
    graph.output(graph.graph_copy(region.graph, {}))
    # Only the children that the graph still calls are taken over.
    return fx.GraphModule(module, graph, type(module).__name__).eval()


def _merge_large_kernel(module: ReparamLargeKernelConv) -> nn.Module:
    if module.lkb_reparam is not None:
        return module
    units = [unit for unit in (module.lkb_origin, module.small_conv) if unit is not None]
    branches = [
        Branch.of([part for part in unit if not isinstance(part, nn.Identity)]) for unit in units
    ]
    supported = [branch for branch in branches if branch is not None]
    if len(supported) < len(units) or any(map(is_watched, units)):
        return module
    with torch.device("meta"):
        result = ReparamLargeKernelConv(
            module.channels, module.kernel_size, module.small_kernel, merged=True
        )
    result.add_module("lkb_reparam", merge_branches(supported))
    return result.eval()


def _is_addition(node: fx.Node) -> bool:
    return node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs


def _is_whole_sum(region: Region, node: fx.Node) -> bool:
    """Whether ``node`` ends a sum in the region's own forward, not in that of a child."""
    if not _is_addition(node) or region.scope(node):
        return False
    users = list(node.users)
    return not (len(users) == 1 and _is_addition(users[0]) and not region.scope(users[0]))


def _merge_sum(region: Region, end: fx.Node) -> bool:
    """Merge the branches of each input in the sum that ends with ``end``, if there are any."""
    obsolete, terms = _open_sum(end)
    by_source: dict[fx.Node, list[_Term]] = defaultdict(list)
    for value in terms:
        term = _branch_of(region, value)
        if term is not None:
            by_source[term.source].append(term)
    changed = False
    for source, candidates in by_source.items():
        chosen = mergeable([term.branch for term in candidates])
        merged = [term for term in candidates if term.branch in chosen]
        calls = [call for term in merged for call in term.calls]
        if not chosen or region.overwrites_after(calls, end):
            continue
        name = _free_name(region.module)
        region.module.add_module(name, merge_branches(chosen))
        with region.graph.inserting_before(end):
            convolution = region.graph.call_module(name, (source,))
        for term in merged:
            terms.remove(term.value)
        terms.append(convolution)
        obsolete += calls
        changed = True
    if changed:
        with region.graph.inserting_before(end):
            total = functools.reduce(
                lambda left, right: region.graph.call_function(operator.add, (left, right)), terms
            )
        end.replace_all_uses_with(total)
        for node in dict.fromkeys(obsolete):
            region.graph.erase_node(node)
    return changed


def _open_sum(end: fx.Node) -> tuple[list[fx.Node], list[Any]]:
    """Additions of a sum, last first, and the values added up."""
    additions: list[fx.Node] = [end]
    terms: list[Any] = []
    for value in end.args:
        if isinstance(value, fx.Node) and _is_addition(value) and len(value.users) == 1:
            inner_additions, inner_terms = _open_sum(value)
            additions += inner_additions
            terms += inner_terms
        elif value != 0:  # Python's sum() starts from 0
            terms.append(value)
    return additions, terms


@dataclass(frozen=True)
class _Term:
    """A value in a sum as a branch from ``source``; ``calls`` are its layers', last first."""

    value: fx.Node
    branch: Branch
    source: fx.Node
    calls: list[fx.Node]


def _branch_of(region: Region, value: Any) -> _Term | None:
    if not isinstance(value, fx.Node):
        return None
    layers: list[nn.Module] = []
    calls: list[fx.Node] = []
    source = value
    while not is_convolution(layers[0] if layers else None):
        module, feeder = region.called(source), only_input(source)
        if feeder is None or len(source.users) > 1:
            break
        if not is_convolution(module) and not is_plain_norm(module):
            break
        layers.insert(0, module)
        calls.append(source)
        source = feeder
    branch = Branch.of(layers)
    return None if branch is None else _Term(value, branch, source, calls)


def _free_name(module: nn.Module) -> str:
    numbered = (f"{_MERGED_NAME}_{number}" for number in count(1))
    return next(name for name in chain([_MERGED_NAME], numbered) if not hasattr(module, name))

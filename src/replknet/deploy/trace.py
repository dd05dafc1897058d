"""Who feeds whom: the module calls of any model, as graphs that torch.fx records."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import Proxy

from replknet.deploy.folding import NORMS, is_watched
from replknet.deploy.reach import reached
from replknet.nn.hooks import has_hooks

_IN_PLACE_OPERATORS = {
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.imatmul,
}
_NO_OPS_IN_EVALUATION = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Region:
    """A module whose forward could be traced as a whole.

    ``prefix`` names the module in the model ("" for the model itself); the graph's targets are
    relative to it. Operations that do nothing in evaluation mode are left out of the graph.
    """

    prefix: str
    module: nn.Module
    graph: fx.Graph

    def name(self, node: fx.Node) -> str:
        """Name in the model of the module that ``node`` calls."""
        return join(self.prefix, str(node.target))

    def called(self, node: fx.Node) -> nn.Module | None:
        """Module that ``node`` calls, if it calls one."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def scope(self, node: fx.Node) -> set[str]:
        """Names of the modules in whose forward ``node`` runs, the called one included."""
        return {name for name, _ in node.meta.get("nn_module_stack", {}).values()}

    def overwrites_after(self, calls: list[fx.Node], end: fx.Node) -> bool:
        """Whether something between the first of ``calls`` and ``end`` writes into a tensor.

        If so, what ``calls`` read must not be read later than they did.
        """
        nodes = list(self.graph.nodes)
        first = min(nodes.index(call) for call in calls)
        return any(map(self._is_in_place, nodes[first + 1 : nodes.index(end)]))

    def _is_in_place(self, node: fx.Node) -> bool:
        name = getattr(node.target, "__name__", str(node.target))
        return (
            bool(getattr(self.called(node), "inplace", False))
            or bool(node.kwargs.get("inplace"))
            or (node.op in ("call_method", "call_function") and name.endswith("_"))
            or node.target in _IN_PLACE_OPERATORS
        )


def trace_regions(model: nn.Module) -> Iterator[Region]:
    """Trace ``model``, which must be in evaluation mode, in the largest possible parts.

    A module whose forward depends on values or shapes, or that has hooks, is a black box in the
    graph around it, and what can be traced inside it is a region of its own. Forwards are run
    symbolically; ``model`` should be a copy.
    """
    yield from _regions(model, "", model, reached(model))


def trace(module: nn.Module) -> Region | None:
    """Trace one module by itself; None if its forward cannot be traced."""
    region, _ = _trace(module, "")
    return region


def takes_one_input(module: nn.Module) -> bool:
    """Whether forward has exactly one parameter, so that a trace covers every way to call it."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    return (
        len(parameters) == 1
        and parameters[0].default is inspect.Parameter.empty
        and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )


def only_input(node: fx.Node) -> fx.Node | None:
    """What a call is given, if that is one value and nothing else."""
    value = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    return value if isinstance(value, fx.Node) else None


def join(prefix: str, name: str) -> str:
    """Qualified name of ``name`` under ``prefix``."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _regions(
    module: nn.Module, prefix: str, root: nn.Module, in_parts: set[nn.Module]
) -> Iterator[Region]:
    # What callers pass to optional parameters is only known at the root: the defaults. And what a
    # forward that cannot be traced uses in parts may not run as a whole.
    if module is root or (takes_one_input(module) and module not in in_parts):
        region, black_boxes = _trace(module, prefix)
        if region is not None:
            yield region
            for name in black_boxes:
                part = module.get_submodule(name)
                yield from _regions(part, join(prefix, name), root, in_parts)
            return
    for name, child in module.named_children():
        yield from _regions(child, join(prefix, name), root, in_parts)


def _trace(module: nn.Module, prefix: str) -> tuple[Region | None, list[str]]:
    """Trace with as few black boxes as possible; also the names of those that were met."""
    if "forward" in vars(module):  # fx would read that of the class
        return None, []
    black_boxes: set[nn.Module] = set()
    while True:
        tracer = _Tracer(set(module.modules()), black_boxes)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = tracer.trace(module)
        except Exception:  # a forward may raise anything when it meets a symbolic value
            if tracer.failed is None or tracer.failed in black_boxes:
                return None, []
            black_boxes.add(tracer.failed)
            continue
        _drop_no_ops(module, graph)
        called = {module.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
        return Region(prefix, module, graph), [
            name
            for name, part in module.named_modules()
            if part in called and not _is_layer(part) and (part in black_boxes or is_watched(part))
        ]


class _Tracer(fx.Tracer):
    def __init__(self, modules: set[nn.Module], black_boxes: set[nn.Module]) -> None:
        super().__init__()
        self.modules = modules
        self.black_boxes = black_boxes
        self.failed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A hook must not meet symbolic values, and what it sees must not change.
        return (
            _is_layer(m)
            or m in self.black_boxes
            or is_watched(m)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if m not in self.modules and not has_hooks(m):  # what it does is its caller's doing
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: Any = None,
    ) -> tuple[Any, list[Any]]:
        # Only what has no default is symbolic: a default often steers Python control flow.
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        required: list[Proxy] = [
            self.create_proxy("placeholder", parameter.name, (), {})
            for parameter in parameters
            if parameter.default is inspect.Parameter.empty
        ]
        return root_fn, [self.root, *required]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, *NORMS))


def _drop_no_ops(module: nn.Module, graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            no_op = type(called) in _NO_OPS_IN_EVALUATION and not is_watched(called)
        else:
            no_op = node.target is F.dropout and node.kwargs.get("training") is False
        if no_op and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)

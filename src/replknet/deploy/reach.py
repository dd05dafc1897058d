"""Which modules the forwards of others use other than by a call, as their source has it."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from math import inf
from types import FunctionType
from typing import Any

from torch import nn

# What an attribute of the instance leads to, an index, and what follows: a call, a comparison with
# None, an assignment.
_ATTRIBUTE = re.compile(r"\bself((?:\.\w+)+)((?:\[[^][]*\])*)\s*(\(|\.|is\b|=(?!=))?")
_HARMLESS = ("(", "is", "=")


def reached(model: nn.Module) -> set[nn.Module]:
    """Modules whose insides the forward of another one uses: their parameters, or a part alone.

    Such as ``self.conv`` in ``self.conv.weight``, ``self.conv[0](x)`` or
    ``for layer in self.conv``. There may be too many: only how the source looks is known.
    """
    found: set[nn.Module] = set()
    for module in model.modules():
        kind: Any = type(module)  # mypy finds classes of modules unhashable
        depths = {"": inf} if "forward" in vars(module) else _depths(kind)
        for name, depth in depths.items():
            part: nn.Module | None = module
            for key in name.split(".") if name else ():
                part = part._modules.get(key) if part is not None else None
            if part is not None:
                found |= set(_down_to(part, depth)) - {module}
    return found


def _down_to(module: nn.Module, depth: float) -> Iterator[nn.Module]:
    yield module
    for child in module.children() if depth > 0 else ():
        yield from _down_to(child, depth - 1)


@lru_cache(maxsize=1024)
def _depths(kind: type) -> dict[str, float]:
    """By name (``"child"``, ``"child.part"``, ``""`` for all): how far below it parts are used.

    Those of ``self.units`` by ``self.units[0](x)`` (0), theirs by ``self.units[0].weight`` (1).
    """
    depths: defaultdict[str, float] = defaultdict(float)
    todo, done = {"forward"}, set()
    while todo:
        done.add(method := todo.pop())
        for definition in _definitions(kind, method):
            try:
                source = inspect.getsource(definition)
            except OSError:
                return {"": inf}
            for path, index, after in _ATTRIBUTE.findall(source):
                keys = path.split(".")[1:]
                todo |= {keys[0]} - done
                for end in range(1, len(keys)):
                    depths[".".join(keys[:end])] += 0
                if index or after not in _HARMLESS:
                    deeper = index.count("[") - 1 + (after == ".") if index else 0
                    depths[path[1:]] = max(depths[path[1:]], deeper)
    return dict(depths)


def _definitions(kind: type, name: str) -> Iterator[FunctionType]:
    """What a class and those that it derives from define as a method or property ``name``."""
    for each in kind.__mro__:
        # This package trains by the parts of its blocks; who deploys them knows that.
        if each not in (nn.Module, object) and not each.__module__.startswith("replknet."):
            value = vars(each).get(name)
            value = getattr(value, "fget", value)
            if isinstance(value, FunctionType):
                yield value

"""Which modules the forwards of others use other than by a call, as their source has it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

# What an attribute of the instance leads to; and whether it is but called, compared with None or
# assigned.
_ATTRIBUTES = re.compile(r"\bself((?:\.\w+)+)\b(\s*(?:\(|is\b|=(?!=)))?")


def reached(model: nn.Module) -> set[nn.Module]:
    """Modules whose insides the forward of another one uses: their parameters, or a part alone.

    Such as ``self.conv`` in ``self.conv.weight``, ``self.conv[0](x)`` or
    ``for layer in self.conv``. There may be too many: only how the source looks is known.
    """
    found = set()
    for module in model.modules():
        kind: Any = type(module)  # mypy finds classes of modules unhashable
        names = None if "forward" in vars(module) else _names_of(kind)
        if names is None:
            found |= set(module.children())
        for name in names or ():
            part: nn.Module | None = module
            for key in name.split("."):
                part = part._modules.get(key) if part is not None else None
            if part is not None:
                found.add(part)
    return found


@lru_cache(maxsize=1024)
def _names_of(kind: type) -> frozenset[str] | None:
    """Their names, as ``"child"`` or ``"child.part"``; None if there is no source."""
    names: set[str] = set()
    todo, done = {"forward"}, set()
    while todo:
        done.add(method := todo.pop())
        for definition in _definitions(kind, method):
            try:
                source = inspect.getsource(definition)
            except OSError:
                return None
            for path, harmless in _ATTRIBUTES.findall(source):
                keys = path[1:].split(".")
                todo |= {keys[0]} - done
                names |= {".".join(keys[:end]) for end in range(1, len(keys) + (not harmless))}
    return frozenset(names)


def _definitions(kind: type, name: str) -> Iterator[FunctionType]:
    """What a class and those that it derives from define as a method or property ``name``."""
    for each in kind.__mro__:
        # This package trains by the parts of its blocks; who deploys them knows that.
        if each not in (nn.Module, object) and not each.__module__.startswith("replknet."):
            value = vars(each).get(name)
            value = getattr(value, "fget", value)
            if isinstance(value, FunctionType):
                yield value

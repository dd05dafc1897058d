"""From parsed arguments to a typed configuration, and from results to JSON."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

Config = TypeVar("Config")


def instantiate(config_class: type[Config], arguments: Namespace, **given: Any) -> Config:
    """Configuration whose fields are ``given`` or options of ``arguments``.

    Raises:
        ValueError: the values do not fit each other.
    """
    names = [field.name for field in fields(config_class) if field.name not in given]  # type: ignore[arg-type]
    parser = ArgumentParser()
    parser.add_class_arguments(config_class, skip=set(given))
    sections = parser.instantiate(Namespace({name: arguments[name] for name in names}))
    return config_class(**given, **{name: sections[name] for name in names})


def json_text(result: Any) -> str:
    """A result as JSON, which knows no NaN and no infinity: they become null."""
    return json.dumps(_finite(result), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value

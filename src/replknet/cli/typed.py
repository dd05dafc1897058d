"""From parsed arguments to a typed configuration."""

from __future__ import annotations

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

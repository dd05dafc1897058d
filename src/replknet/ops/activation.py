"""Activations that the native core applies to what it writes."""

from __future__ import annotations

from typing import Literal

from replknet.ops import _binary

Activation = Literal["identity", "relu", "gelu"]
ACTIVATIONS: dict[Activation, int] = {
    "identity": _binary.IDENTITY,
    "relu": _binary.RELU,
    "gelu": _binary.GELU,
}

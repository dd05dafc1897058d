"""Random choices as functions of what they are for, not of who makes them and when."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """Keeps the random numbers of different uses of one seed apart."""

    ORDER = 0
    SAMPLE = 1
    MIX = 2
    SUBSTITUTE = 3


def derive_seed(purpose: Purpose, *parts: int) -> int:
    """Hash of integers of up to 64 bits to a seed of 63 bits, the same everywhere and always."""
    words = struct.pack(f"<{len(parts) + 1}q", purpose, *parts)
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1


def seed_generators(seed: int) -> None:
    """Seed the global CPU generators of ``random``, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 (the generator that timm's transforms use)
    torch.default_generator.manual_seed(seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the global CPU generators at the end of the block."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    tensors = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(tensors)

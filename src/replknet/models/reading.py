"""The raw content of a weights file, without ever running code that it contains."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

METADATA_KEY = "replknet"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_file(path: str | Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Content of a .pth, .pt or .safetensors file, told apart by content, and our metadata.

    Tensors are on the CPU. The metadata is empty for files that are not this package's.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is not a weights file, is damaged, or holds objects other than tensors
            and plain values (whose loading could run code).
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pth"))
        hint = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise IsADirectoryError(f"{path} is a directory, not a checkpoint file{hint}")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path} is empty (0 bytes); copy or download it again")
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start.startswith((_ZIP, _PICKLE)):
        return _read_torch(path), {}
    raise ValueError(f"{path} is not a checkpoint: {_guess(start)}")


def _guess(start: bytes) -> str:
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, saved in place of the file behind it; download the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file with `git lfs pull`"
    return "it begins like neither a PyTorch nor a safetensors file"


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error
    try:
        ours = json.loads(metadata.get(METADATA_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"the metadata of {path} is not JSON ({error})") from error
    if not isinstance(ours, dict):
        raise ValueError(f"the metadata of {path} is a {type(ours).__name__}, not an object")
    return tensors, ours


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        # Trainer files of the field hold their command line as a Namespace: plain attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refused(path, error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, struct.error) as error:
        raise ValueError(_damaged(path, error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named weights")
    return content


def _damaged(path: Path, error: Exception) -> str:
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged ({cause}); "
        "copy or download it again"
    )


def _refused(path: Path, error: Exception) -> str:
    message = str(error)
    if (blocked := re.search(r"GLOBAL (\S+)", message)) is None:
        detail = re.search(r"WeightsUnpickler error: (.*)", message)
        return _damaged(path, ValueError(detail[1] if detail else "not a pickle of weights"))
    return (
        f"{path} holds objects that are not tensors or plain values ({blocked[1]}). Loading them "
        "could run code of whoever made the file, so it is refused. If you trust its origin, load "
        "it once with torch.load(path, weights_only=False) where it was made, save only the state "
        "dict, and use that file"
    )

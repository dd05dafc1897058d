"""What a run was computed with."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from replknet.engine.distributed import Processes

PACKAGES = ("replknet", "torch", "torchvision", "timm", "numpy", "pillow")


def describe_environment(processes: Processes) -> dict[str, Any]:
    """Versions, hardware, processes and command line, JSON-serialisable."""
    device = processes.device
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "processes": processes.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def installed_version(package: str) -> str | None:
    """Version of an installed package, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

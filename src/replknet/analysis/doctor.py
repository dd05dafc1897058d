"""Examine an installation: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from packaging.requirements import Requirement

from replknet.ops import depthwise_conv2d, native
from replknet.ops.algorithm import ALGORITHMS
from replknet.ops.cost import calibration_file, processor_name

EXTRAS = ("export", "webdataset")
VARIABLES = ("REPLKNET_ALGORITHM", "REPLKNET_ISA", "OMP_NUM_THREADS")
TOLERANCE = 1e-5
"""Error of a float32 convolution, in units of the largest output, that is no rounding."""

_REINSTALL = "reinstall replknet; if that does not help, report the processor and system above"

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing examined.

    A "note" is about what is absent or could be better, a "problem" about something required
    that does not work; ``advice`` says what to do.
    """

    subject: str
    value: str
    status: Status = "ok"
    advice: str = ""


def examine() -> list[Finding]:
    """Examine everything. Whatever is wrong is a finding, not an exception."""
    return [
        Finding("replknet", version("replknet")),
        Finding("python", platform.python_version()),
        Finding("system", platform.platform()),
        Finding("processor", processor_name()),
        *_threads(),
        Finding("memory", _memory()),
        Finding("accelerator", _accelerator()),
        *_native_core(),
        *_algorithms(),
        *_calibration(),
        *_libraries(),
        *_variables(),
    ]


def _threads() -> Iterator[Finding]:
    threads, usable = torch.get_num_threads(), _usable_cpus()
    value = f"{threads}, {usable} of {os.cpu_count()} processors usable"
    if threads > usable:
        advice = f"threads get in each other's way: set OMP_NUM_THREADS={usable}"
        yield Finding("threads", value, "note", advice)
    else:
        yield Finding("threads", value)


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return "unknown on this system"
    kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    total, available = (kibibytes[key] / 2**20 for key in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GiB, {available:.1f} GiB of it available"


def _accelerator() -> str:
    if torch.cuda.is_available():
        return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    return "Apple MPS" if torch.backends.mps.is_available() else "none that PyTorch sees"


def _native_core() -> Iterator[Finding]:
    if reason := native.why_missing():
        yield Finding("native core", "missing: convolutions run on PyTorch", "note", reason)
        return
    others = [isa for isa in native.isas() if isa != native.isa()]
    also = f", also {', '.join(others)}" if others else ""
    yield Finding("native core", f"{native.isa()}{also}")


def _algorithms() -> Iterator[Finding]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 8, 20, 20, generator=generator)
    weight = torch.randn(8, 1, 13, 13, generator=generator)
    exact = F.conv2d(image.double(), weight.double(), padding=6, groups=8)
    for name in ALGORITHMS:
        subject = f"algorithm {name}"
        device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        try:
            result = depthwise_conv2d(image.to(device), weight.to(device), algorithm=name).cpu()
        except NotImplementedError as reason:
            yield Finding(subject, "not usable", "note", str(reason))
        except Exception as failure:
            yield Finding(subject, f"fails: {failure}", "problem", _REINSTALL)
        else:
            error = ((result - exact).abs().max() / exact.abs().max()).item()
            value = f"error {error:.0e} of the largest value"
            if error <= TOLERANCE:
                yield Finding(subject, value)
            else:
                yield Finding(subject, value, "problem", _REINSTALL)


def _calibration() -> Iterator[Finding]:
    file = calibration_file(torch.get_num_threads())
    if file.exists():
        yield Finding("calibration", str(file))
    else:
        advice = "`replknet benchmark --calibrate` fits the choice of algorithms to this machine"
        yield Finding("calibration", "the one that comes with the package", "note", advice)


def _libraries() -> Iterator[Finding]:
    for requirement in map(Requirement, requires("replknet") or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            yield _library(requirement, "problem", f"pip install '{requirement}'")
            continue
        for extra in EXTRAS:
            if marker.evaluate({"extra": extra}):
                yield _library(requirement, "note", f"pip install 'replknet[{extra}]'")


def _library(requirement: Requirement, otherwise: Status, advice: str) -> Finding:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Finding(requirement.name, "not installed", otherwise, advice)
    if requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, found)
    return Finding(requirement.name, f"{found}, needed {requirement.specifier}", otherwise, advice)


def _variables() -> Iterator[Finding]:
    for name in VARIABLES:
        if name in os.environ:
            yield Finding(name, os.environ[name])
    algorithm = os.environ.get("REPLKNET_ALGORITHM", "auto")
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        advice = f"unset it, or use one of {', '.join(ALGORITHMS)}"
        yield Finding("REPLKNET_ALGORITHM", f"no algorithm {algorithm!r}", "problem", advice)

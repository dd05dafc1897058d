"""The wheel: what it holds, where it runs, and an install without a compiler."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def build_wheel(directory, *options, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, *options, "--wheel-dir", str(directory), str(ROOT)],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    (wheel,) = directory.glob("replknet-*.whl")
    return wheel


def run_in_new_environment(wheel, directory, code):
    """Run code where the wheel is installed; its dependencies come from this environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), *install],
        check=True,
        capture_output=True,
    )
    (site_packages,) = directory.glob("lib/python*/site-packages")
    # A path in a .pth file is searched last, and the .pth files in it are not read.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run = subprocess.run(
        [str(python), "-c", code], cwd=directory, capture_output=True, text=True, check=True
    )
    return run.stdout.split()


RUN_NATIVE = """
import torch, replknet
from replknet.ops import depthwise_conv2d, native
print(replknet.__file__, *native.isas())
input, weight = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 5, 5)
outputs = [depthwise_conv2d(input, weight, algorithm=name) for name in ("direct", "torch")]
torch.testing.assert_close(*outputs)
"""

RUN_WITHOUT_CORE = """
import torch, replknet
from replknet.ops import depthwise_conv2d, native
depthwise_conv2d(torch.randn(1, 8, 9, 9), torch.randn(8, 1, 5, 5))
print(replknet.__file__, native.why_missing())
"""


def test_wheel_runs_where_it_is_the_only_copy(tmp_path):
    wheel = build_wheel(tmp_path / "dist", "--config-settings=build-dir=build/wheel")
    names = zipfile.ZipFile(wheel).namelist()
    assert "replknet/ops/libreplknet_core.so" in names
    assert not [name for name in names if "csrc" in name or "tests" in name]
    path, *isas = run_in_new_environment(wheel, tmp_path / "environment", RUN_NATIVE)
    assert Path(path).is_relative_to(tmp_path)
    assert isas[-1] == "baseline"


def test_install_without_a_compiler_succeeds_and_says_so(tmp_path):
    wheel = build_wheel(
        tmp_path / "dist", f"--config-settings=build-dir={tmp_path / 'build'}", CXX="no-compiler"
    )
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    output = run_in_new_environment(wheel, tmp_path / "environment", RUN_WITHOUT_CORE)
    assert Path(output[0]).is_relative_to(tmp_path)
    assert "C++ compiler" in " ".join(output)

"""Algorithm "triton" without a GPU: its kernels in Triton's interpreter, and its refusals."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton_cases import CASES, DTYPES

from replknet.ops import depthwise_conv2d, problem_of, triton_conv, triton_tiles
from replknet.ops.algorithm import ALGORITHMS
from replknet.ops.triton_tiles import WeightTiles

TOLERANCE = {"float32": 5e-7, "float16": 1e-3}
TRITON = ALGORITHMS["triton"]
ON_CUDA = replace(problem_of(torch.zeros(1, 8, 12, 12), torch.zeros(8, 1, 7, 7)), device="cuda")


@pytest.fixture(scope="module")
def interpreted():
    """What ``triton_cases`` prints in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    program = Path(__file__).with_name("triton_cases.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=False
    )
    if "only 0-dimensional arrays can be converted" in run.stderr:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_pass_agrees_with_the_definition(interpreted, name, dtype):
    assert max(interpreted[f"{name}, {dtype}"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["huge", "tiny"])
def test_float32_keeps_its_range(interpreted, name):
    assert max(interpreted[name]) <= TOLERANCE["float32"]


def test_bias_relu_and_nan(interpreted):
    error, nan_stays, others_are_finite = interpreted["bias and relu"]
    assert error <= TOLERANCE["float32"]
    assert nan_stays
    assert others_are_finite


def test_channels_that_do_not_fit_take_turns(interpreted):
    assert interpreted["takes turns"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "NVIDIA GPUs, not on cpu"),
        ({"dtype": torch.float64}, r"not torch\.float64"),
        ({"stride": (2, 1)}, r"not \(2, 1\)"),
        ({"dilation": (1, 3)}, r"\(1, 3\)"),
        ({"pass_": "grad_weight", "width": 900, "kernel_size": (1, 700)}, "700 wide"),
    ],
)
def test_refusals_say_why(change, reason, monkeypatch):
    monkeypatch.setattr(triton_conv, "_machine_support", lambda: triton_conv.Support(True))
    assert TRITON.supports(ON_CUDA).ok
    support = TRITON.supports(replace(ON_CUDA, **change))
    assert not support.ok
    assert re.search(reason, support.reason)


def test_machines_without_triton_or_gpu_are_told(monkeypatch):
    support = triton_conv._machine_support.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in support().reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "this GPU has 7.5" in support().reason
    monkeypatch.setattr(triton_conv, "find_spec", lambda name: None)
    assert "pip install triton" in support().reason


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("output_w", [7, 14, 28, 56, 200])
def test_tiles_fit_the_shared_memory_of_smaller_gpus(terms, output_w):
    large, small = 227 * 1024, 99 * 1024
    for tiles in (
        triton_tiles.correlation_tiles(terms, 32, output_w, output_w),
        triton_tiles.weight_tiles(terms, 32, output_w, output_w, output_w, 13, 6),
        triton_tiles.weight_tiles(terms, 32, 200, 200, 200, 300, 150),
    ):
        assert triton_tiles.within(large, tiles, terms) == tiles
        fitted = triton_tiles.within(small, tiles, terms)
        assert 2 * terms * fitted.depth * fitted.lines * fitted.stages <= small
        assert fitted.columns % fitted.depth == 0 or isinstance(fitted, WeightTiles) or output_w < 9


def test_asked_for_on_the_cpu_it_refuses():
    with pytest.raises(NotImplementedError, match=r"triton.*NVIDIA GPUs"):
        depthwise_conv2d(torch.zeros(1, 2, 5, 5), torch.zeros(2, 1, 3, 3), algorithm="triton")


def test_importing_the_operator_does_not_import_triton_kernels():
    program = "import sys, replknet.ops; sys.exit('replknet.ops.triton_kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)

"""The native core as a library: instruction sets, memory, threads, absence."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import pytest
import torch

from replknet.ops import _binary, native
from replknet.ops.algorithm import ALGORITHMS
from replknet.ops.prepared import pack_filters
from replknet.ops.problem import Problem

DIRECT = ALGORITHMS["direct"]
PROBLEM = Problem(
    "forward", 1, 20, 9, 9, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), torch.float32, "NCHW", "cpu"
)


def test_baseline_is_always_available_and_the_best_is_in_use():
    assert "baseline" in native.isas()
    assert native.isa() == os.environ.get("REPLKNET_ISA", native.isas()[0])


def test_unknown_instruction_set_is_an_error():
    with pytest.raises(ValueError, match=r"one of .*baseline; got 'mmx'"), native.force_isa("mmx"):
        pass
    with native.force_isa("baseline"):
        assert native.isa() == "baseline"


def test_environment_forces_an_instruction_set():
    code = "from replknet.ops import native; print(native.isa())"
    environment = {**os.environ, "REPLKNET_ISA": "baseline"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "baseline"


def test_filters_prepared_for_another_instruction_set_are_refused():
    weight, input = torch.randn(20, 1, 5, 5), torch.randn(1, 20, 9, 9)
    prepared = replace(DIRECT.prepare(PROBLEM, pack_filters(weight)), isa="another")
    with pytest.raises(ValueError, match="prepared for another"):
        DIRECT.forward_prepared_of(PROBLEM, prepared, False)(input, None)


def test_failed_allocation_is_a_memory_error(monkeypatch):
    taps = 2**21
    huge = replace(PROBLEM, channels=1, kernel_size=(taps, taps), padding=(taps // 2,) * 4)
    weight = torch.zeros(1).expand(1, 1, taps, taps)
    monkeypatch.setattr(native, "_float32", lambda tensor: tensor)
    with pytest.raises(MemoryError, match="could not allocate"):
        DIRECT.forward(huge, torch.zeros(1, 1, 9, 9), weight, None, False)


@pytest.mark.parametrize("isa", [] if _binary.library is None else native.isas())
def test_workspace_is_bounded(isa):
    """As docs/operator.md says."""
    bounds = {"direct": 3, "fft": 8 if isa in ("avx512", "amx", "zen4") else 13}
    random = Random(0)
    largest = dict.fromkeys(bounds, 0)
    with native.force_isa(isa):
        for _ in range(3000):
            height, width = (2 ** random.randrange(9) + random.randrange(9) for _ in range(2))
            any_kernel = random.randrange(1, 64), random.randrange(1, 64)
            kernel = random.choice([any_kernel, (random.choice([3, 5, 7, 9]),) * 2])
            problem = replace(
                PROBLEM,
                pass_=random.choice(["forward", "grad_input", "grad_weight"]),
                batch=random.choice([1, 3]),
                channels=random.choice([1, 16, 130, 512, 15_000]),
                height=height,
                width=width,
                kernel_size=kernel,
                padding=(
                    kernel[0] // 2,
                    (kernel[0] - 1) // 2,
                    kernel[1] // 2,
                    (kernel[1] - 1) // 2,
                ),
                layout=random.choice(["NCHW", "NHWC"]),
            )
            for name in bounds:
                if ALGORITHMS[name].supports(problem).ok:
                    size = _binary.library.rk_workspace_bytes(ALGORITHMS[name].struct(problem))
                    largest[name] = max(largest[name], size)
    for name, bound in bounds.items():
        assert 0 < largest[name] <= bound * 2**20, name


def test_calls_from_many_threads_at_once():
    inputs = [torch.randn(1, 20, 9, 9) for _ in range(8)]
    weight = torch.randn(20, 1, 5, 5)
    expected = [DIRECT.forward(PROBLEM, input, weight, None, False) for input in inputs]

    def work(index):
        return all(
            torch.equal(
                DIRECT.forward(PROBLEM, inputs[index], weight, None, False), expected[index]
            )
            for _ in range(100)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_peak_is_measured():
    assert native.fma_peak(1) > 1e9


def test_absent_core_is_a_reason_not_an_import_error(monkeypatch):
    monkeypatch.setattr(_binary, "library", None)
    monkeypatch.setattr(_binary, "reason_missing", "it was not built")
    assert DIRECT.supports(PROBLEM).reason == "it was not built"
    with pytest.raises(NotImplementedError, match="needs the native core: it was not built"):
        native.isas()

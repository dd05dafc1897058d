from __future__ import annotations

import importlib.metadata

import pytest
import torch

from replknet.analysis import doctor
from replknet.ops import native
from replknet.ops.algorithm import ALGORITHMS


def findings() -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor.examine()}


def test_a_working_installation_has_no_problem():
    found = findings()
    assert not [finding for finding in found.values() if finding.status == "problem"]
    assert found["torch"].value == importlib.metadata.version("torch")
    for name in ALGORITHMS:
        assert f"algorithm {name}" in found


def test_missing_core_is_a_note_with_the_reason(monkeypatch):
    monkeypatch.setattr(native, "why_missing", lambda: "was not built: install a compiler")
    finding = findings()["native core"]
    assert (finding.status, finding.advice) == ("note", "was not built: install a compiler")


@pytest.mark.parametrize("wrong", ["value", "error"])
def test_wrong_convolution_is_a_problem(monkeypatch, wrong):
    def broken(image, weight, algorithm):
        if wrong == "error":
            raise RuntimeError("illegal instruction")
        return torch.zeros_like(image)

    monkeypatch.setattr(doctor, "depthwise_conv2d", broken)
    finding = findings()["algorithm torch"]
    assert finding.status == "problem"
    assert finding.advice


def test_libraries(monkeypatch):
    wanted = [
        "numpy>=999",
        "absent-library",
        'absent-extra; extra == "export"',
        'x; extra == "dev"',
    ]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    found = findings()
    assert found["numpy"].status == found["absent-library"].status == "problem"
    assert "needed >=999" in found["numpy"].value
    assert found["absent-library"].advice == "pip install 'absent-library'"
    assert found["absent-extra"].status == "note"
    assert found["absent-extra"].advice == "pip install 'replknet[export]'"
    assert "x" not in found


def test_too_many_threads_are_noted(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(doctor, "_usable_cpus", lambda: 2)
    finding = findings()["threads"]
    assert finding.status == "note"
    assert "OMP_NUM_THREADS=2" in finding.advice


def test_calibration_is_found(monkeypatch, tmp_path):
    file = tmp_path / "cost.json"
    monkeypatch.setattr(doctor, "calibration_file", lambda threads: file)
    assert findings()["calibration"].status == "note"
    file.touch()
    assert findings()["calibration"].value == str(file)


def test_unknown_algorithm_in_the_environment_is_a_problem(monkeypatch):
    monkeypatch.setenv("REPLKNET_ALGORITHM", "magic")
    finding = findings()["REPLKNET_ALGORITHM"]
    assert finding.status == "problem"
    assert "torch_fft" in finding.advice

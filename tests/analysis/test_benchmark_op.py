"""The measuring code; what it measures is never asserted."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from replknet.analysis import benchmark_op, calibrate
from replknet.analysis.benchmark_op import BenchmarkConfig, run_benchmark
from replknet.analysis.benchmark_op_plot import plot
from replknet.analysis.op_engines import Case, engines
from replknet.ops.algorithm import ALGORITHMS
from replknet.ops.cost import CostTable

SMALL = Case(2, 4, (9, 12), (7, 5))


def test_operations_with_and_without_padding():
    nominal, trimmed = SMALL.operations()
    assert nominal == 2 * 2 * 4 * 9 * 12 * 7 * 5
    taps = F.conv2d(torch.ones(1, 1, 9, 12), torch.ones(1, 1, 7, 5), padding=(3, 2))
    assert trimmed == 2 * 2 * 4 * taps.sum()


@pytest.mark.parametrize("name", engines())
def test_every_engine_computes_the_same(name):
    engine, reference = engines()[name], engines()["pytorch nchw"]
    if engine.missing:
        pytest.skip(engine.missing)
    output = engine.forward(SMALL)()
    if name == "openvino":
        output = next(iter(output.values()))
    elif name == "onnxruntime":
        output = output.numpy()
    np.testing.assert_allclose(output, reference.forward(SMALL)(), rtol=1e-4, atol=1e-4)
    if engine.train is not None:
        for got, expected in zip(engine.train(SMALL)(), reference.train(SMALL)(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def tiny_suite(monkeypatch):
    monkeypatch.setitem(benchmark_op.SUITES, "replknet", [(4, 9, 5), (8, 7, 3)])


def test_results_and_plot(tiny_suite, tmp_path):
    names = ("pytorch nchw", "pytorch channels_last", "onnxruntime", "replknet channels_last")
    config = BenchmarkConfig(engines=names, rounds=2, max_seconds=0.05)
    results = list(run_benchmark(config, peak_gflops=100.0))
    assert [(r.case.kernel_size[0], r.passes) for r in results] == [
        (5, "forward"),
        (5, "forward+backward"),
        (3, "forward"),
        (3, "forward+backward"),
    ]
    for result in results:
        by_name = {timing.engine: timing for timing in result.timings}
        assert "replknet channels_last" in by_name
        assert ("onnxruntime" in by_name) <= (result.passes == "forward")
        rivals = [by_name["pytorch nchw"], by_name["pytorch channels_last"]]
        assert max(timing.speedup for timing in rivals) == 1.0
        for timing in result.timings:
            low, high = timing.quartiles_ms
            assert 0 < low <= timing.median_ms <= high
            assert timing.peak_fraction == pytest.approx(timing.trimmed_gflops / 100)
            assert timing.trimmed_gflops < timing.nominal_gflops
    plot(results, tmp_path / "times.svg")
    assert "replknet channels_last" in (tmp_path / "times.svg").read_text()


def test_unknown_engines_are_refused():
    with pytest.raises(ValueError, match="engine 'tensorflow' is none of pytorch nchw"):
        BenchmarkConfig(engines=("tensorflow",))


def test_calibration_measures_every_curve(monkeypatch, tmp_path):
    monkeypatch.setattr(calibrate, "KERNEL_SIZES", [3, 7])
    monkeypatch.setattr(calibrate, "MAP_SIZES", [4, 8])
    monkeypatch.setattr(calibrate, "SECONDS_PER_TIMING", 0.0)
    told = []
    table = calibrate.calibrate(told.append)
    assert len(table.curves) == 6 * (len(ALGORITHMS) - 1)  # triton is not for the CPU
    assert len(set(told)) == 6 * calibrate.SWEEPS  # passes and layouts
    for curve in table.curves.values():
        for terms in (curve.call, curve.channel, curve.plane):
            assert np.array(terms).shape == (2, 2)
            assert np.min(terms) > 0
    table.save(tmp_path / "cost.json")
    assert CostTable.parse((tmp_path / "cost.json").read_text()) == table


def test_calibration_extrapolates_what_takes_too_long(monkeypatch):
    monkeypatch.setattr(calibrate, "KERNEL_SIZES", [3, 6])
    monkeypatch.setattr(calibrate, "MAP_SIZES", [4, 8])
    monkeypatch.setattr(calibrate, "SLOW_SECONDS", 0.0)
    for curve in calibrate.calibrate().curves.values():
        np.testing.assert_allclose(curve.plane[1], 4 * np.array(curve.plane[0]), rtol=0.02)

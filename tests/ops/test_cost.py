"""The cost table: interpolation, files, and the one that comes with the package."""

from dataclasses import replace

import pytest
import torch

from replknet.ops import cost, problem_of
from replknet.ops.cost import CostTable, Curve, calibration_file, cost_table, key, predict

PROBLEM = problem_of(torch.zeros(2, 10, 8, 8), torch.zeros(10, 1, 2, 2))


@pytest.fixture
def table():
    curve = Curve(
        call=[[1000.0] * 2] * 2,
        channel=[[1.0, 4.0], [2.0, 8.0]],
        plane=[[10.0, 40.0], [20.0, 80.0]],
    )
    curves = {key("torch", "forward", "NCHW"): curve}
    return CostTable(torch.get_num_threads(), [1, 4], [4, 16], curves)


def test_interpolates_on_a_logarithmic_scale(table):
    # Half way in both directions: plane 10 * 2 * sqrt(2), channel 1 * 2 * sqrt(2).
    expected = 1e-9 * (1000 + (20 * 10 + 10 * 1) * 2 * 2**0.5)
    assert table.seconds("torch", PROBLEM, "NCHW", 8) == pytest.approx(expected)


def test_kernels_of_the_last_row_are_trimmed_to_small_maps(table):
    trimmed = problem_of(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 7, 7))
    wide = replace(table, kernel_sizes=[1, 31])
    assert wide.seconds("torch", trimmed, "NCHW", 4) == pytest.approx(1e-9 * (1000 + 20 + 2))


def test_maps_beyond_the_table_cost_by_their_area(table):
    edge = table.seconds("torch", PROBLEM, "NCHW", 16) - 1e-6
    beyond = table.seconds("torch", PROBLEM, "NCHW", 160) - 1e-6
    assert beyond > 90 * edge


def test_more_threads_cost_less(table):
    assert replace(table, threads=2 * table.threads).seconds(
        "torch", PROBLEM, "NCHW", 8
    ) > table.seconds("torch", PROBLEM, "NCHW", 8)


def test_a_written_table_is_read_back(table, tmp_path):
    table.save(tmp_path / "sub" / "cost.json")
    assert CostTable.parse((tmp_path / "sub" / "cost.json").read_text()) == table


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost_table.cache_clear()
    yield
    monkeypatch.undo()
    cost_table.cache_clear()


def test_the_calibration_of_this_machine_is_preferred(table, cache):
    threads = torch.get_num_threads()
    built_in = cost_table(threads)
    table.save(calibration_file(threads))
    cost_table.cache_clear()
    assert cost_table(threads) == table != built_in
    assert predict("torch", PROBLEM, "NCHW", 8) == table.seconds("torch", PROBLEM, "NCHW", 8)
    assert cost_table(threads + 1) == built_in


def test_an_unreadable_calibration_is_told_and_not_used(cache):
    path = calibration_file(1)
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.warns(UserWarning, match="benchmark --calibrate"):
        assert cost_table(1).curves


def test_the_calibration_file_depends_on_machine_and_pytorch(monkeypatch):
    files = {calibration_file(1), calibration_file(2)}
    monkeypatch.setattr(torch, "__version__", "0.0")
    files.add(calibration_file(1))
    monkeypatch.setattr(cost, "processor_name", lambda: "another")
    files.add(calibration_file(1))
    assert len(files) == 4

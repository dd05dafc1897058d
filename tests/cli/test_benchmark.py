"""``replknet benchmark``."""

import json

import pytest
import torch

from replknet.analysis import benchmark_op, calibrate
from replknet.cli.main import main
from replknet.ops.cost import calibration_file, cost_table


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(benchmark_op.SUITES, "replknet", [(4, 9, 5)])
    monkeypatch.setattr(calibrate, "KERNEL_SIZES", [3, 7])
    monkeypatch.setattr(calibrate, "MAP_SIZES", [4, 8])
    monkeypatch.setattr(calibrate, "SECONDS_PER_TIMING", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


OP = ["benchmark", "op", "--rounds", "2", "--threads", "1", "--max-seconds", "0.05"]


def test_prints_json_alone(capsys):
    engines = ["--engines", "pytorch nchw", "replknet nchw"]
    assert main([*OP, "--passes", "forward", *engines, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["threads"] == 1
    (result,) = content["results"]
    assert {timing["engine"] for timing in result["timings"]} == {"pytorch nchw", "replknet nchw"}


def test_prints_tables_and_draws(capsys, tmp_path):
    engines = ["--engines", "pytorch nchw", "replknet nchw"]
    assert main([*OP, *engines, "--plot", str(tmp_path / "times.png")]) == 0
    text = capsys.readouterr().out
    assert "1x4x9x9 / 5x5, forward+backward" in text
    assert "replknet nchw" in text
    assert (tmp_path / "times.png").stat().st_size > 1000


def test_what_is_cut_off_has_printed_what_it_measured(capsys, monkeypatch):
    measure, cases = benchmark_op._run_case, []

    def interrupted(case, *rest):
        if cases:
            raise KeyboardInterrupt
        cases.append(case)
        return measure(case, *rest)

    monkeypatch.setattr(benchmark_op, "_run_case", interrupted)
    threads = torch.get_num_threads()
    assert main([*OP, "--engines", "pytorch nchw"]) == 130
    assert "1x4x9x9 / 5x5, forward" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_calibrates_into_the_cache(capsys):
    threads = torch.get_num_threads()
    cost_table.cache_clear()
    built_in = cost_table(threads)
    try:
        assert main(["benchmark", "--calibrate"]) == 0
        assert str(calibration_file(threads)) in capsys.readouterr().out
        cost_table.cache_clear()  # as a new process starts
        assert cost_table(threads) != built_in
    finally:
        cost_table.cache_clear()


def test_without_a_subcommand_says_what_there_is(capsys):
    assert main(["benchmark"]) == 2
    assert "(op, model, train)" in capsys.readouterr().err
    assert main([*OP, "--engines", "tensorflow"]) == 2
    assert "tensorflow" in capsys.readouterr().err

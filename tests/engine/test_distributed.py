"""Two processes started by torchrun, against one process with the same total batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_runs import BATCH_NORM, SECTIONS
from runs import differences, read_metrics, toy_config
from safetensors.torch import load_file

from replknet.engine.train import main

HERE = Path(__file__).parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("distributed")
    main(toy_config(directory / "alone", **SECTIONS))
    main(toy_config(directory / "alone_batch_norm", **BATCH_NORM))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(HERE / "distributed_runs.py"), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def processes(runs):
    return [json.loads((runs / f"process{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("plain", "alone"),
        ("accumulated", "alone"),
        ("stopped", "alone"),
        ("batch_norm", "alone_batch_norm"),
    ],
)
def test_loss_curve_is_that_of_one_process(runs, name, alone):
    alone, found = read_metrics(runs / alone), read_metrics(runs / name)
    assert len(alone) == len(found) == 27  # 24 steps, 3 evaluations
    for one, two in zip(alone, found, strict=True):
        assert two.keys() == one.keys()
        for figure in ("step", "loss", "lr", "grad_norm"):
            if figure in one:
                assert two[figure] == pytest.approx(one[figure], rel=1e-4)


@pytest.mark.parametrize("model", ["last", "best"])
def test_weights_are_those_of_one_process(runs, model):
    one, two = (
        load_file(runs / name / "checkpoints" / f"{model}.safetensors")
        for name in ("alone", "plain")
    )
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def test_batch_norm_is_that_of_the_whole_batch(processes):
    for process in processes:
        assert all(error < 1e-12 for error in process["batch_norm"].values()), process["batch_norm"]


def test_every_sample_is_evaluated_once(processes):
    assert [process["samples"] for process in processes] == [21, 21]  # odd: nothing is padded


def test_group_is_left_by_who_made_it(processes):
    assert all(process["left"] for process in processes)


def test_errors_are_raised_in_every_process(processes, runs):
    for process in processes:
        assert "optimizer.lr (0.01 there, 0.5 asked)" in process["foreign"]
        assert "batch.total 7 does not divide over 2 processes" in process["indivisible"]
        assert "the loss is nan" in process["nan"]
    saved = sorted(path.name for path in (runs / "nan" / "nonfinite").iterdir())
    assert [name.split("-")[1] for name in saved] == ["process0.pt", "process1.pt"]


def test_signal_to_one_process_stops_all_at_the_same_step(processes, runs):
    assert [process["stopped"] for process in processes] == [[False, 10]] * 2
    assert all(process["resumed"] for process in processes)
    assert differences(runs / "stopped", runs / "plain") == []

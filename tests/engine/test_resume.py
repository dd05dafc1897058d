import os
import signal
from dataclasses import replace

import pytest
import torch
from runs import differences, read_metrics, toy_config
from toy import ToyEvaluator, ToyTask

from replknet.engine.config import BatchConfig, ExecutionConfig
from replknet.engine.train import main


def raise_at(monkeypatch, owner, method, number, action):
    """Call ``action`` before the ``number``-th call of a method, counted over instances."""
    original, calls = getattr(owner, method), []

    def counted(self, *args):
        calls.append(None)
        if len(calls) == number:
            action()
        return original(self, *args)

    monkeypatch.setattr(owner, method, counted)


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference") / "run"
    result = main(toy_config(directory))
    assert result.finished
    assert result.step == 18
    return directory


@pytest.mark.parametrize("loss_call", [1, 5, 6, 7, 18])
def test_stop_request_in_training_saves_and_resumes_bit_for_bit(
    tmp_path, monkeypatch, reference, loss_call
):
    with monkeypatch.context() as patch:
        raise_at(patch, ToyTask, "loss", loss_call, interrupt)
        result = main(toy_config(tmp_path))
    assert not result.finished
    assert result.stopped_by == signal.SIGTERM
    assert result.step == loss_call
    assert main(toy_config(tmp_path)).finished
    assert differences(tmp_path, reference) == []


def test_stop_request_in_evaluation_resumes_with_that_evaluation(tmp_path, monkeypatch, reference):
    with monkeypatch.context() as patch:
        raise_at(patch, ToyEvaluator, "update", 5, interrupt)
        result = main(toy_config(tmp_path))
    assert (result.finished, result.step, result.best["epoch"]) == (False, 12, 1)
    assert main(toy_config(tmp_path)).finished
    assert differences(tmp_path, reference) == []


def test_failure_between_checkpoints_resumes_bit_for_bit(tmp_path, monkeypatch, reference):
    def fail():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        raise_at(patch, ToyTask, "loss", 12, fail)
        with pytest.raises(RuntimeError, match="power cut"):
            main(toy_config(tmp_path))
    assert read_metrics(tmp_path)[-1]["step"] == 11  # beyond the checkpoint of step 8
    main(toy_config(tmp_path))
    assert differences(tmp_path, reference) == []
    steps = [record["step"] for record in read_metrics(tmp_path) if "loss" in record]
    assert steps == list(range(1, 19))


def test_float16_scaling_and_accumulation_resume_bit_for_bit(tmp_path, monkeypatch):
    sections = {
        "execution": ExecutionConfig(precision="float16"),
        "batch": BatchConfig(total=8, max_per_process=4),
    }
    main(toy_config(tmp_path / "whole", **sections))
    with monkeypatch.context() as patch:
        raise_at(patch, ToyTask, "loss", 15, interrupt)
        assert not main(toy_config(tmp_path / "cut", **sections)).finished
    main(toy_config(tmp_path / "cut", **sections))
    assert differences(tmp_path / "cut", tmp_path / "whole") == []


def test_damaged_last_state_falls_back_to_the_one_before(tmp_path, monkeypatch, reference, caplog):
    with monkeypatch.context() as patch:
        raise_at(patch, ToyTask, "loss", 11, interrupt)
        main(toy_config(tmp_path))
    state = tmp_path / "checkpoints" / "state.pt"
    state.write_bytes(state.read_bytes()[:-200])
    main(toy_config(tmp_path))
    assert "damaged" in caplog.text
    assert differences(tmp_path, reference) == []


def test_no_readable_state_is_an_error_that_changes_nothing(tmp_path):
    main(toy_config(tmp_path))
    states = [tmp_path / "checkpoints" / name for name in ("state.pt", "state.previous.pt")]
    for state in states:
        state.write_bytes(b"damaged")
    metrics = read_metrics(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint .* can be read"):
        main(toy_config(tmp_path))
    assert [state.read_bytes() for state in states] == [b"damaged"] * 2
    assert read_metrics(tmp_path) == metrics


def test_finished_run_is_left_alone(tmp_path, reference):
    before = {path: path.read_bytes() for path in (reference / "checkpoints").iterdir()}
    result = main(toy_config(reference))
    assert result.finished
    assert result.evaluation == torch.load(reference / "checkpoints/state.pt")["evaluation"]
    assert {path: path.read_bytes() for path in (reference / "checkpoints").iterdir()} == before


def test_seed_changes_the_run_and_execution_does_not_forbid_resuming(tmp_path, reference):
    config = toy_config(tmp_path, run={"seed": 1})
    main(config)
    assert "last.safetensors head.weight" in differences(tmp_path, reference)
    again = replace(config, execution=ExecutionConfig(precision="bfloat16"))
    assert main(again).finished

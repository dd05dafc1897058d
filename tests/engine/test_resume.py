import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from runs import differences, read_metrics, toy_config
from toy import ToyEvaluator, ToyTask

from replknet.engine.config import BatchConfig, ExecutionConfig
from replknet.engine.step import NonFiniteError
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": 24}, r"samples_per_epoch \(48 then, 24 now\)"),
        (
            {"classes": tuple("abd")},
            r"class_names \(\['a', 'b', 'c', 'd'\] then, \['a', 'b', 'd'\]",
        ),
    ],
)
def test_data_that_changed_are_refused_and_nothing_changes(
    tmp_path, monkeypatch, reference, changed, message
):
    shutil.copytree(reference, tmp_path / "run")
    config = toy_config(tmp_path / "run")
    task = ToyTask(replace(config.data, **changed))
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(type(config), "build_task", lambda config: task)
        with pytest.raises(ValueError, match=f"{message}.*restore them.*--run.overwrite true"):
            main(config)
    after = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert after == before
    assert main(config).finished  # the data are back


def test_state_of_an_earlier_version_resumes_and_ends_beyond_the_schedule(
    tmp_path, monkeypatch, reference
):
    shutil.copytree(reference, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoints" / "state.pt", weights_only=True)
    del state["trained_on"]
    torch.save(state, tmp_path / "run" / "checkpoints" / "state.pt")
    config = toy_config(tmp_path / "run")
    task = ToyTask(replace(config.data, samples=32))  # 18 steps are four and a half epochs now
    monkeypatch.setattr(type(config), "build_task", lambda config: task)
    raise_at(monkeypatch, ToyTask, "loss", 1, interrupt)
    result = main(config)
    assert (result.finished, result.step) == (True, 18)


def test_failed_evaluation_loses_no_training(tmp_path, monkeypatch, reference):
    def fail():
        raise ValueError("corrupt images")

    with monkeypatch.context() as patch:
        raise_at(patch, ToyEvaluator, "update", 7, fail)  # after the third epoch
        with pytest.raises(ValueError, match="corrupt images"):
            main(toy_config(tmp_path))
    state = torch.load(tmp_path / "checkpoints" / "state.pt", weights_only=True)
    assert (state["step"], state["finished_epochs"]) == (18, 2)
    assert main(toy_config(tmp_path)).finished
    assert differences(tmp_path, reference) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metric_that_is_not_finite_ends_the_run_with_nothing_overwritten(
    tmp_path, monkeypatch, value
):
    config = toy_config(tmp_path, run={"checkpoint_steps": None})
    computed = []

    def compute(self):
        computed.append(None)
        return {"top1": 0.5, "loss": 1.0 if len(computed) == 1 else value, "table": [math.nan]}

    monkeypatch.setattr(ToyEvaluator, "compute", compute)
    with pytest.raises(NonFiniteError, match=f"after epoch 2 gives loss {value}; no checkpoint"):
        main(config)
    state = torch.load(tmp_path / "checkpoints" / "state.pt", weights_only=True)
    assert (state["step"], state["evaluation"]["loss"]) == (6, 1.0)
    assert [r["epoch"] for r in read_metrics(tmp_path) if "evaluation" in r] == [1]


def test_run_says_what_it_trains_and_where_it_continues(tmp_path, capsys):
    main(toy_config(tmp_path, run={"progress": True}))
    shown = " ".join(capsys.readouterr().err.split())
    assert "a toy on 48 [samples], cpu" in shown
    assert "continuing" not in shown
    main(toy_config(tmp_path, run={"progress": True}))
    shown = " ".join(capsys.readouterr().err.split())
    assert "a toy on 48 [samples], cpu" in shown
    assert "after step 18" in shown


def test_seed_changes_the_run_and_execution_does_not_forbid_resuming(tmp_path, reference):
    config = toy_config(tmp_path, run={"seed": 1})
    main(config)
    assert "last.safetensors head.weight" in differences(tmp_path, reference)
    again = replace(config, execution=ExecutionConfig(precision="bfloat16"))
    assert main(again).finished

import json
from dataclasses import replace

import pytest
import yaml
from runs import read_metrics, toy_config
from safetensors import safe_open
from toy import ToyConfig

from replknet.engine.config import OptimizerConfig
from replknet.engine.run_directory import claim
from replknet.engine.train import main


def snapshot(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tmp_path):
    main(toy_config(tmp_path / "run"))
    return tmp_path / "run"


def test_run_directory_holds_everything_about_the_run(finished):
    assert yaml.safe_load((finished / "config.yaml").read_text())["optimizer"]["lr"] == 1e-2
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["processes"] == 1
    assert environment["packages"]["torch"].startswith("2.")
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    files = {path.name for path in (finished / "checkpoints").iterdir()}
    assert files == {"last.safetensors", "best.safetensors", "state.pt", "state.previous.pt"}
    with safe_open(finished / "checkpoints" / "best.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["replknet"])
    evaluations = [r["evaluation"] for r in read_metrics(finished) if "evaluation" in r]
    assert len(evaluations) == 3
    assert metadata["task"] == "toy"
    assert metadata["metrics"]["top1"] == max(e["top1"] for e in evaluations)
    steps = [record for record in read_metrics(finished) if "loss" in record]
    assert [record["epoch"] for record in steps] == [1] * 6 + [2] * 6 + [3] * 6


def test_another_run_is_refused_with_the_differences_and_nothing_changes(finished):
    before = snapshot(finished)
    other = toy_config(finished, optimizer=OptimizerConfig(lr=0.5))
    message = r"already holds another run.*optimizer.lr \(0.01 there, 0.5 asked\)"
    with pytest.raises(ValueError, match=message):
        main(other)
    assert snapshot(finished) == before


def test_run_without_results_gives_way_to_another(tmp_path):
    failed = replace(toy_config(tmp_path), data=ToyConfig(samples=7))
    with pytest.raises(ValueError, match="exceeds the training set"):
        main(failed)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events of the failed run").touch()
    result = main(toy_config(tmp_path))
    assert result.finished
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["samples"] == 48
    assert not (tmp_path / "tensorboard" / "events of the failed run").exists()


@pytest.mark.parametrize("result", ["checkpoints/last.safetensors", "nonfinite/step0-process0.pt"])
def test_run_with_a_model_or_batches_that_are_not_finite_does_not_give_way(tmp_path, result):
    with claim(toy_config(tmp_path)):
        (tmp_path / result).parent.mkdir(exist_ok=True)
        (tmp_path / result).touch()
    with pytest.raises(ValueError, match="already holds another run"):
        main(toy_config(tmp_path, optimizer=OptimizerConfig(lr=0.5)))
    assert (tmp_path / result).exists()


def test_overwrite_starts_afresh_and_keeps_files_of_others(finished):
    (finished / "notes.txt").write_text("mine")
    other = toy_config(finished, optimizer=OptimizerConfig(lr=0.5), run={"overwrite": True})
    assert main(other).step == 18
    assert (finished / "notes.txt").read_text() == "mine"
    assert max(record["lr"] for record in read_metrics(finished) if "lr" in record) == 0.5
    assert len(list((finished / "tensorboard").iterdir())) == 1


def test_directory_that_holds_no_run_is_refused_even_to_overwrite(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files but no run"):
            main(toy_config(tmp_path, run={"overwrite": overwrite}))
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


def test_second_launch_is_refused_while_the_first_one_runs(finished):
    config = toy_config(finished, run={"overwrite": True})
    before = snapshot(finished)
    with claim(toy_config(finished)):
        with pytest.raises(ValueError, match=r"another process trains in .*--run.directory"):
            main(config)
        assert snapshot(finished) == before
    main(config)


def test_file_is_refused_as_run_directory(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match="is a file"):
        main(toy_config(tmp_path / "run"))


def test_leftovers_of_a_killed_write_are_removed(finished):
    leftover = finished / "checkpoints" / ".state.new.pt.123.partial"
    leftover.write_bytes(b"half")
    main(toy_config(finished))
    assert not leftover.exists()


def test_training_set_smaller_than_a_batch_is_refused(tmp_path):
    config = toy_config(tmp_path)
    config = replace(config, data=replace(config.data, samples=7))
    with pytest.raises(ValueError, match=r"batch\.total 8 exceeds the training set"):
        main(config)


def test_without_evaluation_there_is_a_last_model_only(tmp_path):
    result = main(toy_config(tmp_path, run={"eval_every": 0}))
    assert (result.finished, result.best, result.evaluation) == (True, None, None)
    assert (tmp_path / "checkpoints" / "last.safetensors").exists()
    assert not (tmp_path / "checkpoints" / "best.safetensors").exists()


def test_evaluation_every_second_epoch_includes_the_last(tmp_path):
    main(toy_config(tmp_path, run={"eval_every": 2, "log_every": 5}))
    records = read_metrics(tmp_path)
    assert [r["epoch"] for r in records if "evaluation" in r] == [2, 3]
    assert [r["step"] for r in records if "loss" in r] == [5, 10, 15]

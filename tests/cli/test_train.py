"""``replknet train`` and ``replknet eval``, on a folder of small images."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from replknet.cli.main import build_parser, main
from replknet.cli.typed import instantiate
from replknet.engine.classification import ClassificationTrainConfig
from replknet.engine.recipes import list_recipes
from replknet.models import create_model, read_checkpoint

TINY = {"kernels": [7, 7], "layers": [1, 1], "channels": [8, 12], "stem_stride": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes, dark and bright, told apart within an epoch."""
    root = tmp_path_factory.mktemp("photos")
    chance = np.random.default_rng(0)
    for name, low in (("bright", 150), ("dark", 0)):
        (root / name).mkdir()
        for number in range(20):
            pixels = chance.integers(low, low + 100, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def options(photos, tmp_path):
    values = {
        "data.root": photos,
        "model.name": "replknet_nano",
        "model.kwargs": json.dumps(TINY),
        "preprocessing.input_size": 16,
        "batch.total": 8,
        "optimizer.lr": 1e-2,
        "schedule.epochs": 8,  # the running statistics need some steps to settle
        "run.directory": tmp_path / "run",
        "run.workers": 0,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def parse(*words):
    return instantiate(ClassificationTrainConfig, build_parser("train").parse_args(list(words)))


def test_trains_evaluates_resumes_and_fine_tunes(options, photos, tmp_path, capsys):
    assert main(["train", *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finished"]
    assert result["step"] == 8 * (32 // 8)
    assert result["best"]["value"] == 100
    best = tmp_path / "run" / "checkpoints" / "best.safetensors"

    assert main(["eval", str(best), "--data.root", str(photos), "--workers", "0", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert (metrics["top1"], metrics["images"]) == (100, 8)
    assert [row["name"] for row in metrics["per_class"]] == ["bright", "dark"]
    assert main(["eval", str(best), "--data.root", str(photos), "--workers", "0"]) == 0
    assert "top-1 100.00 %" in capsys.readouterr().out

    assert main(["train", *options]) == 0  # the same run: there is nothing left to do
    assert f"the model is {best}" in capsys.readouterr().out

    assert main(["train", *options, "--optimizer.lr", "1e-4"]) == 2
    assert "already holds another run" in capsys.readouterr().err

    again = ["--model.checkpoint", str(best), "--run.directory", str(tmp_path / "tuned")]
    assert main(["train", *options, *again, "--optimizer.lr", "1e-6", "--run.eval_every", "0"]) == 0
    assert "last.safetensors" in capsys.readouterr().out
    start = load_file(best)
    tuned = load_file(tmp_path / "tuned" / "checkpoints" / "last.safetensors")
    np.testing.assert_allclose(tuned["head.weight"], start["head.weight"], atol=1e-3)


def test_checkpoint_of_a_run_is_usable_alone(options, tmp_path, capsys):
    assert main(["train", *options, "--ema.decay", "0.5"]) == 0
    path = tmp_path / "run" / "checkpoints" / "best.safetensors"
    metadata = read_checkpoint(path).metadata
    assert metadata["task"] == "classification"
    assert metadata["class_names"] == ["bright", "dark"]
    assert metadata["metrics"]["images"] == 8
    model = create_model(checkpoint=path)
    assert model.num_classes == 2
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["model"]["kwargs"] == TINY


def test_config_of_a_run_is_a_config(options, tmp_path, capsys):
    assert main(["train", *options, "--schedule.epochs", "2"]) == 0
    stored = tmp_path / "run" / "config.yaml"
    copy = tmp_path / "copy"
    assert main(["train", "--config", str(stored), "--run.directory", str(copy)]) == 0
    one, two = (
        load_file(run / "checkpoints" / "last.safetensors") for run in (stored.parent, copy)
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_nan_ends_the_command_with_the_batch_saved(options, tmp_path, capsys):
    assert main(["train", *options, "--optimizer.lr", "1e30"]) == 1
    error = capsys.readouterr().err
    assert "replknet train: the " in error
    assert list((tmp_path / "run" / "nonfinite").glob("step*-process0.pt"))


def test_default_is_the_finetune_recipe():
    assert parse("--data.root", "photos") == parse("--config", "finetune", "--data.root", "photos")


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_a_configuration_with_a_run_directory_of_its_own(name):
    config = parse("--config", name, "--data.root", "images")
    assert config.run.directory == f"runs/{name}"


def test_input_size_brings_its_own_evaluation():
    config = parse("--data.root", "photos", "--preprocessing.input_size", "384")
    assert (config.preprocessing.crop_mode, config.preprocessing.crop_pct) == ("squash", 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "finetun"], "no recipe 'finetun'; the recipes are"),
        (["--data.root", "x", "--optimizer.learning_rate", "1"], "optimizer.learning_rate"),
        (["--data.root", "x", "--batch.total", "many"], "batch.total"),
    ],
)
def test_words_that_are_no_options_are_refused(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data.root is missing"),
        (["--data.root", "no/such/folder"], "data.root is not a folder"),
        (["--data.root", "x", "--optimizer.lr", "0"], "optimizer.lr must be positive"),
        (["--data.root", "x", "--execution.device", "cuda:99"], "needs GPU 99"),
    ],
)
def test_values_that_cannot_work_are_refused(words, message, tmp_path, capsys):
    assert main(["train", *words, "--run.directory", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_eval_says_which_file_is_missing(photos, capsys):
    assert main(["eval", "absent.pth", "--data.root", str(photos)]) == 2
    assert "absent.pth" in capsys.readouterr().err


def test_eval_reports_in_the_main_process_only(monkeypatch, photos, capsys):
    monkeypatch.setattr("replknet.cli.eval.evaluate_classifier", lambda config: None)
    assert main(["eval", "model.safetensors", "--data.root", str(photos), "--json"]) == 0
    assert capsys.readouterr().out == ""

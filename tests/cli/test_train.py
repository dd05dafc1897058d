"""``replknet train`` and ``replknet eval``, on a folder of small images."""

import json
import shutil
from pathlib import Path

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
from replknet.tasks.classification.datasets import DataConfig, open_dataset

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


def test_weights_that_explode_at_the_end_of_an_epoch_are_not_saved(options, tmp_path, capsys):
    two_steps = ["--optimizer.lr", "1e30", "--batch.total", "15"]
    assert main(["train", *options, *two_steps]) == 1
    assert "the evaluation after epoch 1 gives loss nan" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.fixture
def damaged(photos, tmp_path):
    """The photos, with one validation image that cannot be decoded."""
    root = tmp_path / "damaged"
    held_out = [open_dataset(DataConfig(str(photos)), "val").source(index) for index in (0,)]
    shutil.copytree(photos, root)
    (root / Path(held_out[0]).relative_to(photos)).write_bytes(b"no image")
    return root


def test_one_corrupt_image_in_a_small_set_is_tolerated(options, damaged, tmp_path, capsys):
    words = [*options, "--data.root", str(damaged), "--schedule.epochs", "2"]
    assert main(["train", *words, "--data.max_corrupt_fraction", "0"]) == 2
    assert "1 of 8 images are corrupt" in capsys.readouterr().err
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 4  # the first epoch, kept

    assert main(["train", *words]) == 0
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    assert [r["evaluation"]["skipped"] for r in records if "evaluation" in r] == [1, 1]


def test_command_that_failed_gives_its_directory_to_the_corrected_one(options, photos, capsys):
    words = [*options, "--schedule.epochs", "2"]
    assert main(["train", *words, "--data.root", "photso"]) == 2
    assert main(["train", *words, "--model.name", "replknet_nan"]) == 2
    assert main(["train", *words]) == 0
    assert main(["train", *words, "--data.root", f"{photos}/"]) == 0
    assert main(["train", *words, "--data.root", "photso"]) == 2
    assert "differs in data.root" in capsys.readouterr().err


def test_data_that_lost_or_gained_images_or_classes_are_refused(options, photos, tmp_path, capsys):
    root = tmp_path / "changing"
    shutil.copytree(photos, root)
    words = [*options, "--data.root", str(root), "--schedule.epochs", "2"]
    assert main(["train", *words]) == 0

    shutil.copytree(root / "dark", root / "grey")
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert "class_names (['bright', 'dark'] then, ['bright', 'dark', 'grey'] now)" in error
    assert "--run.overwrite true" in error

    shutil.rmtree(root / "grey")
    for path in sorted((root / "dark").iterdir())[:10]:
        path.unlink()
    assert main(["train", *words]) == 2
    assert "samples_per_epoch (32 then, 24 now)" in capsys.readouterr().err


def test_start_tells_model_weights_and_data(options, photos, tmp_path, capsys, caplog):
    words = [*options, "--schedule.epochs", "2", "--json"]
    assert main(["train", *words]) == 0
    output, shown = capsys.readouterr()
    json.loads(output)
    shown = " ".join(shown.split())
    assert "replknet_nano with random weights, 32 training and 8 validation images" in shown
    assert "images of 2 classes, 16x16, cpu" in shown
    warning = "training from random weights; give --model.checkpoint"
    assert caplog.text.count(warning) == 1
    assert main(["train", *words]) == 0
    assert caplog.text.count(warning) == 1  # not when it continues

    start = tmp_path / "run" / "checkpoints" / "last.safetensors"
    words += ["--run.directory", str(tmp_path / "tuned"), "--model.checkpoint", str(start)]
    assert main(["train", *words]) == 0
    assert f"from {start}," in capsys.readouterr().err.replace("\n", "")
    assert (
        main(["train", *words, "--run.overwrite", "true", "--optimizer.layer_decay", "null"]) == 0
    )
    assert caplog.text.count(warning) == 1


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
        (["--data.root", "x", "--execution.device", "gpu"], "cuda or cuda:N, got 'gpu'"),
        (["--data.root", "x", "--execution.compile", "foo"], "or null for none, got 'foo'"),
        (["--data.root", "x", "--augmentation.hflip", "7"], "in [0, 1], got 7"),
        (["--data.root", "x", "--augmentation.re_prob", "-1"], "in [0, 1], got -1"),
        (["--data.root", "x", "--augmentation.smoothing", "1"], "in [0, 1), got 1"),
        (["--data.root", "x", "--augmentation.padding", "-1"], "not be negative"),
        (["--data.root", "x", "--augmentation.re_count", "0"], "at least 1, got 0"),
        (["--data.root", "x", "--augmentation.scale", "[0, 1]"], "two positive numbers"),
        (["--data.root", "x", "--augmentation.ratio", "[2, 1]"], "got 2.0 and 1.0"),
        (["--data.root", "x", "--augmentation.auto_augment", "foo"], "policy of timm, such as"),
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

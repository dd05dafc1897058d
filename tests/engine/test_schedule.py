"""Learning rate of every parameter group at every step, against the authors' closed form."""

import re

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser

from replknet.cli.train import add_arguments
from replknet.cli.typed import instantiate
from replknet.engine.classification import ClassificationTrainConfig
from replknet.engine.config import ScheduleConfig
from replknet.engine.optimizer import create_optimizer
from replknet.engine.recipes import find_recipe
from replknet.engine.schedule import learning_rate, set_learning_rate
from replknet.models import create_model

# recipe: batch, peak, weight decay, epochs, warm-up, drop path, mixup, cutmix, layer decay, EMA,
# min lr, as in the paper's appendix and the authors' README
IMAGENET_1K, IMAGENET_22K = 1_281_167, 14_197_122
PUBLISHED = {
    "replknet_31b_1k_pretrain_224": (2048, 4e-3, 0.05, 300, 10, 0.5, 0.8, 1, None, 0.9999, 1e-6),
    "replknet_31b_1k_finetune_384": (1024, 4e-4, 1e-8, 30, 1, 0.8, 0, 0, 0.7, 0.9999, 1e-6),
    "replknet_31b_22k_pretrain_224": (4096, 4e-3, 0.05, 90, 5, 0.1, 0.8, 1, None, None, 1e-6),
    "replknet_31l_22k_pretrain_224": (4096, 4e-3, 0.05, 90, 5, 0.1, 0.8, 1, None, None, 1e-6),
    "replknet_31b_22k_to_1k_224": (512, 4e-4, 1e-8, 30, 1, 0.2, 0, 0, 0.7, 0.9999, 1e-6),
    "replknet_31b_22k_to_1k_384": (512, 4e-4, 1e-8, 30, 1, 0.3, 0, 0, 0.7, 0.9999, 3e-4),
    "replknet_31l_22k_to_1k_384": (512, 4e-4, 1e-8, 30, 1, 0.3, 0, 0, 0.7, 0.9999, 3e-4),
}


def read_recipe(name, *options):
    parser = ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    arguments = parser.parse_args(["--config", name, "--data.root", "images", *options])
    return instantiate(ClassificationTrainConfig, arguments)


def published_rates(peak, lowest, epochs, warmup, steps_per_epoch):
    """Rates of all steps, as arrays: the authors' linspace, then their cosine."""
    rising = np.linspace(0, peak, warmup * steps_per_epoch)
    count = (epochs - warmup) * steps_per_epoch
    falling = lowest + (peak - lowest) * np.cos(np.pi * np.arange(count) / count / 2) ** 2
    return np.concatenate([rising, falling])


def published_layer(name):
    """Layer group of a parameter of a 31B or 31L, from 0 to 13."""
    if name.startswith("stem"):
        return 0
    if name.startswith("transitions"):
        return {"0": 1, "1": 2, "2": 11}[name.split(".")[1]]
    if match := re.match(r"stages\.(\d)\.blocks\.(\d+)", name):
        stage, block = map(int, match.groups())
        return {0: 1, 1: 2, 2: 3 + block // 4, 3: 12}[stage]
    assert name.startswith(("norm", "head"))
    return 13


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_says_what_was_published(name):
    config = read_recipe(name)
    batch, lr, decay, epochs, warmup, drop, mixup, cutmix, layer_decay, ema, low = PUBLISHED[name]
    assert config.model.name == f"replknet_{name.split('_')[1]}"
    assert config.model.kwargs == {"drop_path_rate": drop}
    assert config.model.num_classes == (21841 if "22k_pretrain" in name else 1000)
    assert config.preprocessing.input_size == int(name.rsplit("_", 1)[1])
    assert config.preprocessing.crop_mode == ("squash" if name.endswith("384") else "center")
    assert config.batch.total == batch
    assert config.batch.total % (8 * config.batch.max_per_process) == 0
    optimizer, augmentation = config.optimizer, config.augmentation
    assert (optimizer.lr, optimizer.weight_decay, optimizer.layer_decay) == (lr, decay, layer_decay)
    assert (optimizer.betas, optimizer.eps, optimizer.clip_grad) == ((0.9, 0.999), 1e-8, None)
    assert config.schedule == ScheduleConfig(epochs, warmup, low)
    assert (config.ema.decay, config.ema.warmup) == (ema, False)
    assert (augmentation.mixup, augmentation.cutmix) == (mixup, cutmix)
    assert (augmentation.mixup_prob, augmentation.switch_prob) == (1.0, 0.5)
    assert (augmentation.smoothing, augmentation.color_jitter) == (0.1, 0.4)
    assert augmentation.auto_augment == "rand-m9-mstd0.5-inc1"
    erasing = (augmentation.re_prob, augmentation.re_mode, augmentation.re_count)
    assert erasing == (0.25, "pixel", 1)
    assert config.loss == "cross_entropy"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_leaves_nothing_that_matters_to_the_defaults(name):
    stated = yaml.safe_load(find_recipe(name).read_text())
    assert stated["optimizer"].keys() >= {"lr", "weight_decay", "betas", "eps", "layer_decay"}
    assert "clip_grad" in stated["optimizer"]
    assert stated["schedule"].keys() == {"epochs", "warmup_epochs", "min_lr"}
    assert stated["augmentation"].keys() >= {
        *("scale", "hflip", "color_jitter", "auto_augment", "re_prob", "mixup", "cutmix"),
        *("mixup_prob", "switch_prob", "smoothing"),
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_rate_of_every_step_is_the_published_one(name):
    config = read_recipe(name)
    images = IMAGENET_22K if "22k_pretrain" in name else IMAGENET_1K
    steps_per_epoch = images // config.batch.total
    schedule, peak = config.schedule, config.optimizer.lr
    wanted = published_rates(
        peak, schedule.min_lr, schedule.epochs, schedule.warmup_epochs, steps_per_epoch
    )
    rates = [learning_rate(step, peak, schedule, steps_per_epoch) for step in range(len(wanted))]
    np.testing.assert_allclose(rates, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_group_has_its_rate_and_decay(name):
    config = read_recipe(name)
    model = create_model(config.model.name, channels=(2, 4, 6, 8), num_classes=5)
    optimizer = create_optimizer(model, config.optimizer)
    groups = [
        (group, parameter) for group in optimizer.param_groups for parameter in group["params"]
    ]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {parameter for _, parameter in groups} == set(names)
    assert len(groups) == len(names)
    decay = config.optimizer.layer_decay or 1.0
    scales = np.array([decay ** (13 - published_layer(names[p])) for _, p in groups])
    for group, parameter in groups:
        bare = names[parameter].endswith("bias") or parameter.ndim <= 1
        assert group["weight_decay"] == (0.0 if bare else config.optimizer.weight_decay)
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    schedule = config.schedule
    wanted = published_rates(
        config.optimizer.lr, schedule.min_lr, schedule.epochs, schedule.warmup_epochs, 3
    )
    for step, rate in enumerate(wanted):
        set_learning_rate(optimizer, learning_rate(step, config.optimizer.lr, schedule, 3))
        found = np.array([group["lr"] for group, _ in groups])
        np.testing.assert_allclose(found, rate * scales, rtol=1e-12, atol=1e-15)


def test_schedule_without_warm_up_starts_at_the_peak():
    schedule = ScheduleConfig(epochs=2, warmup_epochs=0, min_lr=0.1)
    rates = [learning_rate(step, 1.0, schedule, 2) for step in range(4)]
    np.testing.assert_allclose(rates, published_rates(1.0, 0.1, 2, 0, 2))


def test_warm_up_of_one_step_has_rate_zero():
    assert learning_rate(0, 1.0, ScheduleConfig(epochs=2, warmup_epochs=1), 1) == 0.0

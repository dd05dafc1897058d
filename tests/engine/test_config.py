from dataclasses import replace

import pytest
from runs import toy_config

from replknet.engine.config import (
    BatchConfig,
    EmaConfig,
    ExecutionConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    differences,
    identity,
    plain,
    split_batch,
)
from replknet.engine.distributed import choose_device


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchConfig(total=0), "batch.total must be at least 1, got 0"),
        (lambda: BatchConfig(max_per_process=0), "batch.max_per_process must be at least 1"),
        (lambda: OptimizerConfig(lr=0.0), "optimizer.lr must be positive, got 0.0"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "optimizer.weight_decay must not be negative"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"optimizer.betas must lie in \[0, 1\)"),
        (lambda: OptimizerConfig(eps=0.0), "optimizer.eps must be positive"),
        (lambda: OptimizerConfig(layer_decay=1.5), r"optimizer.layer_decay must lie in \(0, 1\]"),
        (lambda: OptimizerConfig(clip_grad=0.0), "optimizer.clip_grad must be positive"),
        (lambda: ScheduleConfig(epochs=0), "schedule.epochs must be at least 1"),
        (lambda: ScheduleConfig(epochs=3, warmup_epochs=3), "got 3 of 3 epochs"),
        (lambda: ScheduleConfig(min_lr=-1.0), "schedule.min_lr must not be negative"),
        (lambda: EmaConfig(decay=1.0), r"ema.decay must lie in \(0, 1\)"),
        (lambda: RunConfig(directory=""), "run.directory must not be empty"),
        (lambda: RunConfig(seed=-1), "run.seed must not be negative"),
        (lambda: RunConfig(workers=-1), "run.workers must not be negative"),
        (lambda: RunConfig(eval_every=-1), "run.eval_every must not be negative"),
        (lambda: RunConfig(log_every=0), "run.log_every must be at least 1"),
        (lambda: RunConfig(checkpoint_minutes=0.0), "run.checkpoint_minutes must be positive"),
        (lambda: RunConfig(checkpoint_steps=0), "run.checkpoint_steps must be at least 1"),
        (
            lambda: ExecutionConfig(compile="foo"),
            "execution.compile must be one of .*inductor.*, or null for none, got 'foo'",
        ),
        (
            lambda: TrainConfig(
                optimizer=OptimizerConfig(lr=1e-4), schedule=ScheduleConfig(min_lr=1e-3)
            ),
            "schedule.min_lr 0.001 exceeds optimizer.lr 0.0001",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("total", "most", "processes", "wanted"),
    [
        (2048, 64, 8, (64, 4)),  # the published pre-training
        (2048, None, 8, (256, 1)),
        (96, 20, 2, (16, 3)),  # the largest divisor that fits
        (7, 3, 1, (1, 7)),
        (8, 100, 1, (8, 1)),
    ],
)
def test_total_batch_is_split_over_processes_and_passes(total, most, processes, wanted):
    assert split_batch(BatchConfig(total, most), processes) == wanted


@pytest.mark.parametrize(("total", "processes"), [(10, 4), (2, 4)])
def test_total_batch_that_does_not_divide_is_refused(total, processes):
    with pytest.raises(ValueError, match=f"batch.total {total} does not divide over 4 processes"):
        split_batch(BatchConfig(total), processes)


def test_identity_leaves_out_how_and_where_but_keeps_what(tmp_path):
    config = toy_config(tmp_path)
    other = replace(
        config,
        execution=ExecutionConfig(precision="bfloat16"),
        batch=replace(config.batch, max_per_process=2),
        run=replace(config.run, directory="elsewhere", workers=3),
    )
    assert identity(plain(config)) == identity(plain(other))
    for changed in (
        replace(config, run=replace(config.run, seed=5)),
        replace(config, batch=BatchConfig(total=4)),
        replace(config, optimizer=replace(config.optimizer, lr=1.0)),
    ):
        assert identity(plain(config)) != identity(plain(changed))


def test_identity_takes_two_spellings_of_a_path_for_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = plain(toy_config(tmp_path))

    def found(root, checkpoint):
        return identity(values | {"data": {"root": root}, "model": {"checkpoint": checkpoint}})

    same = found("photos", "a.pth")
    assert found("photos/", "./a.pth") == found(f"{tmp_path}/x/../photos", "a.pth") == same
    assert found("other", "a.pth") != same
    assert found("photos", None) != same


def test_differences_of_long_lists_begin_where_they_are():
    before = {"lr": 1.0, "names": list("abcdefghij"), "pair": [1, 2], "same": 3}
    now = {"lr": 2.0, "names": list("abcdefghix"), "pair": [1, 3], "new": 4, "same": 3}
    assert differences(before, now, words="{} then, {} now") == [
        "lr (1.0 then, 2.0 now)",
        "names[9:] (['j'] then, ['x'] now)",
        "new (None then, 4 now)",
        "pair ([1, 2] then, [1, 3] now)",
    ]


@pytest.mark.parametrize("device", ["gpu", "cuda:first", "meta", ""])
def test_device_that_is_none_is_refused_with_those_that_are(device):
    with pytest.raises(ValueError, match=f"auto, cpu, cuda or cuda:N, got '{device}'"):
        choose_device(device, 0)


def test_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="needs GPU 99, this machine has"):
        choose_device("cuda:99", 0)


def test_base_configuration_has_no_task():
    with pytest.raises(NotImplementedError, match="subclass that builds a task"):
        TrainConfig().build_task()

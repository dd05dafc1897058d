"""What an optimizer step does to the weights, against steps computed by hand."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from runs import read_metrics, toy_config
from toy import ToyConfig, ToyTask

from replknet.engine import train
from replknet.engine.batchnorm import SynchronizedBatchNorm2d
from replknet.engine.config import BatchConfig, EmaConfig, ExecutionConfig, OptimizerConfig
from replknet.engine.distributed import Processes
from replknet.engine.precision import autocast
from replknet.engine.setup import create_state, enable_grad_checkpointing, wrap
from replknet.engine.step import NonFiniteError, Stepper, seed_everything
from replknet.tasks.task import LoaderOptions

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
STEPS = 6


def never():
    return False


def stepper_of(tmp_path, **sections):
    """A stepper and its batches, on a model without dropout and batch statistics."""
    sections = {"data": ToyConfig(), "ema": EmaConfig()} | sections
    config = toy_config(tmp_path, **sections)
    seed_everything(0)
    task = ToyTask(config.data)
    state = create_state(config, task, ALONE)
    network = wrap(state.model, config.execution, ALONE)
    stepper = Stepper(config, task, state, network, ALONE, tmp_path / "nonfinite")
    return stepper, list(task.train_loader(LoaderOptions(batch_size=8)).epoch(0))


def weights(stepper):
    return torch.cat([p.detach().flatten().clone() for p in stepper.state.model.parameters()])


def test_accumulated_passes_equal_one_big_batch(tmp_path):
    whole, batches = stepper_of(tmp_path)
    parts, _ = stepper_of(tmp_path)
    for images, labels in batches:
        whole.take([(images, labels)], STEPS, stop=never)
        parts.take(list(zip(images.split(2), labels.split(2), strict=True)), STEPS, stop=never)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("clip", [1e-3, None])
def test_gradient_norm_is_told_and_clipped_with_and_without_amp(tmp_path, precision, clip):
    stepper, batches = stepper_of(
        tmp_path,
        execution=ExecutionConfig(precision=precision),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=clip),
    )
    reference = copy.deepcopy(stepper.state.model)
    with autocast(stepper.config.execution, ALONE.device):
        stepper.task.loss(reference, batches[0]).backward()
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in reference.parameters()))
    used = []
    original = stepper.state.optimizer.step

    def recording_step(*args, **kwargs):
        gradients = [p.grad.double().square().sum() for p in stepper.parameters]
        used.append(math.sqrt(sum(gradients)))
        return original(*args, **kwargs)

    stepper.state.optimizer.step = recording_step
    step = stepper.take(batches[:1], STEPS, stop=never)
    assert step.grad_norm == pytest.approx(norm, rel=2e-2 if precision != "float32" else 1e-5)
    assert used == [pytest.approx(clip or step.grad_norm, rel=1e-3)]


def test_overflow_of_float16_gradients_skips_the_step_and_lowers_the_scale(tmp_path):
    stepper, batches = stepper_of(tmp_path, execution=ExecutionConfig(precision="float16"))
    stepper.take(batches[:1], STEPS, stop=never)
    stepper.state.scaler.update(2.0**40)
    before = weights(stepper)
    step = stepper.take(batches[1:2], STEPS, stop=never)
    assert math.isinf(step.grad_norm) or math.isnan(step.grad_norm)
    assert torch.equal(weights(stepper), before)
    assert stepper.state.scaler.get_scale() == 2.0**39


def test_moving_average_follows_the_weights_by_its_decay(tmp_path):
    stepper, batches = stepper_of(tmp_path, ema=EmaConfig(decay=0.75), data=ToyConfig())
    average = weights(stepper)
    for batch in batches[:4]:
        stepper.take([batch], STEPS, stop=never)
        average = 0.75 * average + 0.25 * weights(stepper)
    found = torch.cat([p.flatten() for p in stepper.state.evaluated_model.parameters()])
    torch.testing.assert_close(found, average)
    assert not torch.allclose(found, weights(stepper))


def test_moving_average_with_warm_up_starts_at_the_weights(tmp_path):
    stepper, batches = stepper_of(tmp_path, ema=EmaConfig(decay=0.9999, warmup=True))
    for batch in batches[:2]:
        stepper.take([batch], STEPS, stop=never)
    moved = weights(stepper)
    found = torch.cat([p.flatten() for p in stepper.state.evaluated_model.parameters()])
    start = weights(stepper_of(tmp_path)[0])
    assert (found - moved).norm() < (found - start).norm()


def test_run_stops_at_nan_with_its_batch_saved_and_nothing_overwritten(tmp_path):
    config = toy_config(tmp_path)
    config = replace(config, data=replace(config.data, nan_at=3))
    with pytest.raises(NonFiniteError, match="the loss is nan at step"):
        train.main(config)
    (saved,) = (tmp_path / "nonfinite").iterdir()
    content = torch.load(saved, weights_only=True)
    ((images, labels),) = content["batches"]
    assert images.isnan().flatten(1).any(1).sum() == 1
    assert len(labels) == 8
    assert read_metrics(tmp_path)[-1]["step"] == content["step"]
    for state in (tmp_path / "checkpoints").glob("state*.pt"):
        tensors = torch.load(state, weights_only=True)["model"].values()
        assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_infinite_gradient_of_a_finite_loss_stops_before_the_step(tmp_path, monkeypatch):
    stepper, batches = stepper_of(tmp_path)
    before = weights(stepper)

    def loss(self, model, batch):
        logits = model(batch[0])
        return (logits - logits.detach()).abs().sqrt().sum()  # 0, with an infinite derivative

    monkeypatch.setattr(ToyTask, "loss", loss)
    with pytest.raises(NonFiniteError, match=r"the gradient norm is (nan|inf) at step 0"):
        stepper.take(batches[:1], STEPS, stop=never)
    assert torch.equal(weights(stepper), before)
    assert len(list((tmp_path / "nonfinite").iterdir())) == 1


def test_compiled_network_trains_the_same_weights(tmp_path):
    eager, batches = stepper_of(tmp_path)
    compiled, _ = stepper_of(tmp_path, execution=ExecutionConfig(compile="eager"))
    assert compiled.network is not compiled.state.model
    for batch in batches[:3]:
        eager.take([batch], STEPS, stop=never)
        compiled.take([batch], STEPS, stop=never)
    torch.testing.assert_close(weights(compiled), weights(eager))
    assert compiled.state.model.state_dict().keys() == eager.state.model.state_dict().keys()


def test_model_is_channels_last_if_asked(tmp_path):
    for wanted in (True, False):
        stepper, _ = stepper_of(tmp_path, execution=ExecutionConfig(channels_last=wanted))
        weight = stepper.state.model.stem.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is wanted


def test_grad_checkpointing_is_turned_on_or_refused(tmp_path):
    stepper, _ = stepper_of(tmp_path, execution=ExecutionConfig(grad_checkpointing=True))
    assert stepper.state.model.grad_checkpointing
    with pytest.raises(ValueError, match="Linear has no gradient checkpointing"):
        enable_grad_checkpointing(torch.nn.Linear(2, 2))


def test_sync_bn_on_the_cpu_names_the_norms_it_leaves_alone(tmp_path, caplog, monkeypatch):
    two = Processes(rank=0, world_size=2, device=torch.device("cpu"))
    task = ToyTask(ToyConfig(batch_norm=True))
    state = create_state(toy_config(tmp_path), task, two)
    assert type(state.model.norm) is SynchronizedBatchNorm2d
    assert caplog.text == ""
    model = task.build_model()
    model.norm = torch.nn.BatchNorm3d(6)
    monkeypatch.setattr(task, "build_model", lambda: model)
    create_state(toy_config(tmp_path), task, two)
    assert "in BatchNorm3d every process normalises" in caplog.text


def test_batches_in_containers_are_moved_whole():
    from replknet.engine.batches import grouped, to_device

    image = torch.zeros(2, 3, 4, 4)
    batch = {"image": image, "boxes": [torch.zeros(1)], "pair": (image, "name")}
    moved = to_device(batch, torch.device("meta"), ExecutionConfig())
    assert moved["image"].device.type == moved["boxes"][0].device.type == "meta"
    assert moved["image"].is_contiguous(memory_format=torch.channels_last)
    assert moved["pair"][1] == "name"
    assert list(grouped(range(7), 3)) == [[0, 1, 2], [3, 4, 5]]


def test_total_batch_larger_than_a_process_holds_is_accumulated_in_a_run(tmp_path):
    sections = {"data": ToyConfig(), "ema": EmaConfig()}
    train.main(toy_config(tmp_path / "whole", **sections))
    train.main(toy_config(tmp_path / "parts", batch=BatchConfig(8, 2), **sections))
    for whole, part in zip(
        read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts"), strict=True
    ):
        if "loss" in whole:
            assert part["loss"] == pytest.approx(whole["loss"], rel=1e-4)

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from replknet.analysis import benchmark_train
from replknet.analysis.benchmark_networks import CaseTimings, NetworkTiming, run_benchmark
from replknet.analysis.benchmark_networks_plot import plot
from replknet.analysis.benchmark_train import (
    TrainBenchmarkConfig,
    TrainCase,
    gradient,
    relative,
    training_step,
)
from replknet.analysis.memory import why_not_measurable
from replknet.analysis.train_engines import TrainEngine, train_engines
from replknet.analysis.train_split import kind_of, time_split
from replknet.cli.benchmark_networks import comparisons
from replknet.cli.main import main
from replknet.deploy.plain import on_pytorch
from replknet.models.replknet import RepLKNet
from replknet.nn import DepthwiseConv2d, PointwiseConv2d

EAGER = ("pytorch nchw", "pytorch channels_last", "replknet")
COMPILED = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("torch.compile", "replknet compiled")
]
LABELS = torch.tensor([0, 1, 0])


def network() -> RepLKNet:
    torch.manual_seed(0)
    return RepLKNet((11, 7), (1, 1), (8, 16), num_classes=5)


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny(monkeypatch):
    """Every model is a small one."""
    monkeypatch.setattr(TrainCase, "build", lambda self, name: network())


@pytest.mark.parametrize("engine", [*EAGER, *COMPILED])
def test_engines_compute_the_gradient(engine):
    model = network()
    double = on_pytorch(model).double().train()
    expected = gradient(double, images().double(), LABELS)
    trained, image = train_engines()[engine].prepare(model, images())
    assert trained.training
    assert relative(gradient(trained, image, LABELS), expected) <= 1e-4
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_stock_engines_have_no_layer_of_ours():
    model = network()
    for name, engine in train_engines().items():
        trained, _ = engine.prepare(model, images())
        ours = [m for m in trained.modules() if isinstance(m, DepthwiseConv2d | PointwiseConv2d)]
        assert bool(ours) == name.startswith("replknet"), name


def test_a_step_is_one_of_adamw():
    model, twin = network().train(), network().train()
    step = training_step(model, images(), LABELS)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if p.ndim > 1]},
            {"params": [p for p in twin.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=1e-8,
        weight_decay=0.05,
    )
    for _ in range(2):
        step()
        F.cross_entropy(twin(images()), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = network().state_dict()
    for (name, tensor), expected in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, expected, msg=name)
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
    assert not torch.equal(model.norm.bias, before["norm.bias"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_have_no_stochastic_depth():
    model = TrainCase(1, (32, 32)).build("swin_tiny_patch4_window7_224")
    assert model.training
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(image), model(image))


def test_relative():
    ones = [torch.ones(3), torch.ones(1)]
    assert relative(ones, ones) == 0
    assert relative([torch.ones(3), torch.zeros(1)], ones) == pytest.approx(0.5)


def test_a_run(tiny, tmp_path):
    config = TrainBenchmarkConfig(
        batch_sizes=(2, 3), image_sizes=((32, 48),), rounds=2, memory=False
    )
    results = list(run_benchmark(config, peak_gflops=1e6))
    assert [result.case.batch_size for result in results] == [2, 3]
    for result in results:
        pairs = [(timing.model, timing.engine) for timing in result.timings]
        assert pairs == [(model, engine) for model in config.models for engine in EAGER]
        for timing in result.timings:
            assert timing.samples == 2
            assert timing.difference <= 1e-3
            assert 0 < timing.gflops / 1e6 == pytest.approx(timing.peak_fraction)
            # Operators of the step that was split, and all the rest of it.
            assert {"large depthwise", "norm", "optimizer", "other"} < set(timing.split)
            assert all(milliseconds > 0 for milliseconds in timing.split.values())
    plot(results, tmp_path / "times.svg")
    assert (tmp_path / "times.svg").read_text().count("<svg") == 1


def test_another_function_is_refused(tiny, monkeypatch):
    def other(model: nn.Module, image: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
        changed = copy.deepcopy(model).train()
        nn.init.zeros_(changed.stages[0].blocks[0].large_kernel.small_conv.bn.weight)
        return changed, image

    engines = train_engines() | {"replknet": TrainEngine("replknet", other)}
    monkeypatch.setattr(benchmark_train, "train_engines", lambda: engines)
    config = TrainBenchmarkConfig(models=("replknet_31b",), image_sizes=((32, 32),), memory=False)
    with pytest.raises(RuntimeError, match="gradient of replknet_31b in replknet differs by"):
        list(run_benchmark(config))


def test_split_covers_both_passes_and_foreign_models():
    model = timm.create_model("convnext_atto", num_classes=2)
    step = training_step(model.train(), images(), LABELS)
    split = time_split(step)
    kinds = {"pointwise, linear", "small depthwise", "other convolution", "norm", "activation"}
    assert kinds | {"optimizer", "other"} == set(split)
    forward_alone = time_split(lambda: model(images()))
    assert "optimizer" not in forward_alone
    x, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 9, 9)
    arguments = (x, weight, None, (1, 1), (4, 4), (1, 1), False, (0, 0), 4)
    assert kind_of("aten::convolution", arguments) == "large depthwise"
    backward = (x, x, weight, None, (1, 1), (4, 4), (1, 1), False, (0, 0), 4, (True,) * 3)
    assert kind_of("aten::convolution_backward", backward) == "large depthwise"
    assert kind_of("replknet::depthwise_conv2d_grad_weight", (x, x, (3, 3))) == "small depthwise"
    assert kind_of("aten::convolution", (x, torch.ones(2, 4, 1, 1))) == "pointwise, linear"
    assert kind_of("aten::convolution", (x, torch.ones(2, 4, 3, 3))) == "other convolution"
    assert kind_of("aten::_softmax_backward_data", ()) == "attention"
    assert kind_of("aten::_log_softmax", (x, 1, False)) is None


def test_comparisons_state_time_and_memory():
    def timing(model: str, engine: str, ms: float, memory: int | None) -> NetworkTiming:
        return NetworkTiming(model, engine, ms, (ms, ms), 1, 1.0, 1.0, None, memory, 0.0, {})

    timings = (
        timing("ours", "pytorch nchw", 400.0, 50),
        timing("ours", "pytorch channels_last", 300.0, 200),
        timing("ours", "replknet", 120.0, 150),
        timing("ours", "replknet compiled", 100.0, 100),
        timing("theirs", "pytorch nchw", 90.0, None),
    )
    lines = comparisons(CaseTimings(TrainCase(1, (8, 8)), timings))
    assert lines == [
        "ours: 3.00x as fast as its best stock engine, pytorch channels_last; 0.50 of its peak "
        "memory",
        "ours: 0.90x as fast as theirs in its best stock engine, pytorch nchw",
    ]


@pytest.mark.skipif(bool(why_not_measurable()), reason=why_not_measurable())
def test_command_measures_memory_in_a_process_of_its_own(capsys):
    command = ["benchmark", "train", "--models", "replknet_nano", "--engines", "replknet"]
    options = ["--image-sizes", "64", "--rounds", "1", "--threads", "1", "--json"]
    assert main([*command, *options, "--batch-sizes", "8"]) == 0
    content = json.loads(capsys.readouterr().out)
    (result,) = content["results"]
    (timing,) = result["timings"]
    parameters = sum(p.numel() for p in timm.create_model("replknet_nano").parameters())
    # At least a gradient and two moments of AdamW; nowhere near a gigabyte.
    assert 3 * 4 * parameters < timing["peak_memory"] < 2**30
    assert result["case"]["batch_size"] == 8


def test_command_prints_tables(tiny, capsys, tmp_path):
    options = ["--image-sizes", "32", "--rounds", "2", "--threads", "1", "--no-memory"]
    assert main(["benchmark", "train", *options, "--plot", str(tmp_path / "times.png")]) == 0
    text = capsys.readouterr().out
    assert "training step, batch 4, 32x32" in text
    assert "x as fast as its best stock engine" in text
    assert "optimizer" in text
    assert (tmp_path / "times.png").stat().st_size > 1000
    assert main(["benchmark", "train", "--engines", "onnxruntime"]) == 2
    assert "onnxruntime" in capsys.readouterr().err

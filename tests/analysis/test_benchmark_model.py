from __future__ import annotations

import time

import pytest
import timm
import torch
from torch import nn

import replknet
from replknet.analysis import benchmark_model
from replknet.analysis.benchmark_model import ModelBenchmarkConfig, ModelCase
from replknet.analysis.benchmark_networks import run_benchmark
from replknet.analysis.benchmark_networks_plot import plot
from replknet.analysis.memory import peak_bytes, why_not_measurable
from replknet.analysis.model_engines import ModelEngine, model_engines, torch_call
from replknet.analysis.model_split import kind_of, time_split
from replknet.cli.benchmark_networks import image_size
from replknet.cli.main import main
from replknet.deploy import optimize, plain
from replknet.models.replknet import RepLKNet
from replknet.nn import DepthwiseConv2d
from replknet.ops.packed_blocks import large_kernel_seconds

ENGINES = ("pytorch nchw", "replknet")


def network() -> RepLKNet:
    torch.manual_seed(0)
    return RepLKNet((9, 7), (1, 1), (8, 16), num_classes=5).eval()


@pytest.fixture
def tiny(monkeypatch):
    """Every model is a small one."""
    monkeypatch.setattr(ModelCase, "build", lambda self, name: network())


@pytest.mark.parametrize("name", [name for name in model_engines() if name != "torch.compile"])
def test_engines_compute_the_same(name):
    model, image = network(), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        (output,) = model_engines()[name].prepare(model, image)()
        expected = model(image)
    assert (output - expected).abs().max() <= 1e-4 * expected.std()


def test_stock_form_has_only_convolutions_of_pytorch():
    network_ = plain(network())
    layers = [module for module in network_.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == 4 + 2 + 2 * 5
    assert not any(isinstance(layer, DepthwiseConv2d) for layer in layers)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network_.modules())


def test_a_run(tiny, tmp_path):
    config = ModelBenchmarkConfig(
        engines=ENGINES, batch_sizes=(1, 2), image_sizes=((32, 48),), rounds=2, memory=False
    )
    results = list(run_benchmark(config, peak_gflops=1e6))
    assert [result.case.batch_size for result in results] == [1, 2]
    for result in results:
        pairs = [(timing.model, timing.engine) for timing in result.timings]
        assert pairs == [(model, engine) for model in config.models for engine in ENGINES]
        for timing in result.timings:
            seconds = timing.median_ms / 1e3
            assert timing.images_per_second == pytest.approx(result.case.batch_size / seconds)
            assert 0 < timing.gflops / 1e6 == pytest.approx(timing.peak_fraction)
            assert timing.difference <= 1e-4
            assert timing.peak_memory is None
            assert bool(timing.split) == (timing.engine == "replknet")
        ours = result.best("replknet_31b", ours=True)
        assert ours is result.timings[1]
        assert result.best("resnet18", ours=False) is None
    plot(results, tmp_path / "times.svg")
    assert (tmp_path / "times.svg").read_text().count("<svg") == 1


def test_another_function_is_refused(tiny, monkeypatch):
    engine = ModelEngine("replknet", lambda model, image: lambda: [torch.randn(1, 5)])
    monkeypatch.setattr(benchmark_model, "model_engines", lambda: {"replknet": engine})
    config = ModelBenchmarkConfig(models=("replknet_31b",), image_sizes=((32, 32),), memory=False)
    with pytest.raises(RuntimeError, match="replknet_31b in replknet differs by"):
        list(run_benchmark(config))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="engine 'tvm' is none of pytorch nchw"):
        ModelBenchmarkConfig(engines=("tvm",))
    with pytest.raises(ValueError, match="'replknet_99' is no model"):
        ModelBenchmarkConfig(models=("replknet_99",))
    with pytest.raises(ValueError, match="must be positive"):
        ModelBenchmarkConfig(batch_sizes=(0,))
    with pytest.raises(ValueError, match="got '12by3'"):
        image_size("12by3")


def test_image_sizes():
    assert image_size("224") == (224, 224)
    assert image_size("512x2048") == (512, 2048)


def test_backbones_and_fixed_input_sizes():
    maps = torch_call(
        ModelCase(1, (64, 64), "backbone").build("resnet10t"), torch.ones(1, 3, 64, 64)
    )()
    assert len(maps) == 5
    swin = ModelCase(1, (64, 96), "classifier").build("swin_tiny_patch4_window7_224")
    assert swin(torch.ones(1, 3, 64, 96)).shape == (1, 1000)


def test_time_split():
    fast = optimize(timm.create_model("convnext_atto").eval())
    image = torch.randn(1, 3, 64, 64)
    split = time_split(fast, torch_call(fast, image), rounds=2)
    assert list(split)[-1] == "other"
    assert {"pointwise", "small depthwise", "other convolution", "linear"} < set(split)
    assert all(seconds > 0 for seconds in split.values())
    assert not any(module._forward_hooks for module in fast.modules())
    assert kind_of(nn.ReLU()) is None


def test_time_split_of_native_stages():
    fast = optimize(replknet.create_model("replknet_nano").eval())
    call = torch_call(fast, torch.randn(1, 3, 64, 64))
    whole = time_split(fast, call, rounds=2)
    handle = fast.stages[0].blocks[0].register_forward_hook(lambda *_: None)
    by_layers = time_split(fast, call, rounds=2)  # as one stage is not one call
    handle.remove()
    for split in (whole, by_layers):
        assert {"pointwise", "large depthwise", "small depthwise"} < set(split)
        assert all(seconds > 0 for seconds in split.values())
    with large_kernel_seconds() as times, torch.no_grad():
        call()
    assert len(times) == len(fast.stages)
    assert 0 < sum(times) < sum(whole.values()) + sum(by_layers.values())
    call()
    assert len(times) == len(fast.stages)


@pytest.mark.skipif(bool(why_not_measurable()), reason=why_not_measurable())
def test_peak_memory():
    size = 64 * 2**20
    assert 0.9 * size <= peak_bytes(lambda: torch.ones(size, dtype=torch.uint8)) <= 2 * size
    assert peak_bytes(lambda: time.sleep(0)) <= size / 8


def test_command(tiny, capsys, tmp_path):
    options = ["--image-sizes", "32", "--rounds", "2", "--threads", "1", "--no-memory"]
    command = ["benchmark", "model", *options, "--engines", *ENGINES]
    assert main([*command, "--plot", str(tmp_path / "times.png")]) == 0
    text = capsys.readouterr().out
    assert "classifier, batch 1, 32x32" in text
    assert "x as fast as its best stock engine" in text
    assert (tmp_path / "times.png").stat().st_size > 1000

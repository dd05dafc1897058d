from __future__ import annotations

import copy
import io
import mmap
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close
from toy_networks import randomize

from replknet.deploy import banded, compare, fuse, reparameterize
from replknet.deploy.banded import BandedSequential
from replknet.deploy.optimize import optimization_report, optimize
from replknet.deploy.packed import FrozenDepthwiseConv2d, PackedConv2d, PackedMLP
from replknet.models.replknet import RepLKNet
from replknet.ops import _binary, use
from replknet.ops.packed_blocks import Blocks

NATIVE = _binary.library is not None
pytestmark = pytest.mark.skipif(not NATIVE, reason="there is no native core")
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def network(**options) -> RepLKNet:
    torch.manual_seed(0)
    return randomize(
        RepLKNet((13, 7), (1, 2), (16, 40), num_classes=options.pop("num_classes", 10), **options)
    )


def assert_same(model: nn.Module, fast: nn.Module, image: torch.Tensor = IMAGE) -> None:
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        expected, actual = exact(image.double()), fast(image)
    if isinstance(expected, torch.Tensor):
        expected, actual = [expected], [actual]
    assert len(expected) == len(actual)
    for want, got in zip(expected, actual, strict=True):
        assert want.shape == got.shape
        assert (want - got).abs().max() <= 1e-5 * want.std()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"small_kernel": None, "dw_ratio": 1.5},
        {"stem_stride": 1, "in_chans": 5},
        {"num_classes": 0},
        {"form": "fused"},
        {"form": "merged"},
        {"drop_path_rate": 0.5, "drop_rate": 0.5},
    ],
)
def test_classifiers(options):
    model = network(**options)
    image = torch.randn(2, options.get("in_chans", 3), 40, 56)
    fast = optimize(model)
    assert_same(model, fast, image)
    report = optimization_report(fast)
    assert set(report.left_alone) <= {"stem.0.conv", "head", "norm"}
    assert len(report.replaced) == 3 + 2 + 3 * 4


@pytest.mark.parametrize("norm", [False, True])
def test_feature_extractor(norm):
    model = timm.create_model(
        "replknet_31b",
        features_only=True,
        kernels=(13, 7),
        layers=(1, 1),
        channels=(16, 40),
        norm_intermediate_features=norm,
    )
    model = randomize(model)
    fast = optimize(model)
    assert_same(model, fast)
    assert fast.feature_info.channels() == model.feature_info.channels()
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in fast(IMAGE))


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv2_035", "repvgg_a0", "resnet10t"])
def test_other_networks(name):
    model = randomize(timm.create_model(name, num_classes=7))
    fast = optimize(model)
    assert_same(model, fast)
    report = optimization_report(fast)
    assert report.replaced or name == "repvgg_a0"
    assert "convolution is dense with a" in str(report)


def test_any_batch_and_size_and_no_change_of_results():
    model = network()
    fast = optimize(model)
    images = torch.randn(5, 3, 33, 70)
    together = fast(images)
    assert_same(model, fast, images)
    assert torch.equal(fast(images), together)
    one_by_one = torch.cat([fast(image[None]) for image in images])
    assert torch.allclose(one_by_one, together, rtol=0, atol=1e-5 * together.std().item())
    assert torch.equal(fast(images.to(memory_format=torch.channels_last)), together)


def test_the_model_is_not_changed():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    fast = optimize(model)
    assert model.training
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_stage_leaves_its_input_alone():
    model = network()
    stage, fast = model.stages[1].eval(), optimize(model).stages[1]
    x = torch.randn(2, 40, 9, 8).to(memory_format=torch.channels_last)
    before = x.clone()
    assert_same(stage, fast, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("algorithm", ["direct", "fft"])
def test_a_stage_is_one_native_call_with_the_results_of_its_blocks(algorithm, monkeypatch):
    stage = optimize(network()).stages[1]
    x = torch.randn(3, 40, 9, 8)
    with use(algorithm), torch.no_grad():
        expected = x
        for block in stage.blocks:
            expected = block(expected)
        calls = []
        call = Blocks.__call__
        monkeypatch.setattr(Blocks, "__call__", lambda *args: calls.append(1) or call(*args))
        assert torch.equal(stage(x), expected)
        assert len(calls) == 1
        assert stage(x).is_contiguous(memory_format=torch.channels_last)


def test_a_stage_calls_its_blocks_where_one_has_hooks_or_is_not_native():
    stage = optimize(network()).stages[1]
    x = torch.randn(1, 40, 9, 8)
    with torch.no_grad():
        expected = stage(x)
        for watched in (stage.blocks[0].pw2, stage.blocks[1], stage.blocks[1].mlp):
            seen = []
            handle = watched.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            assert torch.equal(stage(x), expected)
            assert len(seen) == 1
            handle.remove()
        with use("torch"):
            assert_close(stage(x), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"got \(1, 41, 9, 8\)"):
        stage(torch.randn(1, 41, 9, 8))


def test_a_stage_prepares_its_call_once_and_anew_after_a_change(monkeypatch):
    stage, other = optimize(network()).stages[1], optimize(network()).stages[1]
    for buffer in other.buffers():
        buffer.mul_(0.5)
    made = []
    start = Blocks.__init__
    monkeypatch.setattr(
        Blocks, "__init__", lambda self, blocks: made.append(1) or start(self, blocks)
    )
    x = torch.randn(1, 40, 9, 8)
    with torch.no_grad():
        expected = stage(x)
        assert torch.equal(stage(x), expected)
        assert len(made) == 1
        stage(torch.randn(1, 40, 5, 8))
        assert torch.equal(stage(x), expected)
        assert len(made) == 3
        stage.load_state_dict(other.state_dict())  # in place, filters and their spectra
        assert torch.equal(stage(x), other(x))
        for name, buffer in stage.blocks[0].pw1.named_buffers():
            setattr(stage.blocks[0].pw1, name, buffer * 3)  # in memory of its own
        changed = stage(x)
        for block in stage.blocks:
            x = block(x)
        assert torch.equal(changed, x)
        stage.double()
        assert_close(stage(x.double()).float(), stage.float()(x), rtol=0, atol=1e-4)


def test_copies_and_pickles():
    fast = optimize(network())
    expected = fast(IMAGE)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert torch.equal(other(IMAGE), expected)
    empty = optimize(network(drop_path_rate=0.1))
    for buffer in empty.buffers():
        buffer.zero_()
    empty.load_state_dict(fast.state_dict())
    assert torch.equal(empty(IMAGE), expected)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no advice about pages here")
def test_weights_lie_side_by_side():
    buffers = [*optimize(network()).buffers()]
    starts = [buffer.data_ptr() for buffer in buffers]
    ends = [start + buffer.nbytes for start, buffer in zip(starts, buffers, strict=True)]
    assert all(start % 64 == 0 for start in starts)
    assert max(ends) - min(starts) <= sum(buffer.nbytes + 63 for buffer in buffers)


def test_many_threads():
    fast = optimize(network())
    images = [torch.randn(1, 3, 32 + 8 * i, 48) for i in range(8)]
    with torch.inference_mode():
        expected = [fast(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(fast, images * 4))
    assert all(torch.equal(r, e) for r, e in zip(results, expected * 4, strict=True))


def test_optimizing_twice():
    fast = optimize(network())
    assert torch.equal(optimize(fast)(IMAGE), fast(IMAGE))


def test_activations_are_fused_in_sequences():
    relu = nn.ReLU()  # one object in two places
    sequence = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        relu,
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        relu,
        nn.GELU(),
        nn.Identity(),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.GELU(approximate="tanh"),
    )
    fast = optimize(sequence)
    assert_same(sequence, fast)
    kinds = [type(layer) for layer in fast]
    identity = nn.Identity
    assert kinds == [
        PackedConv2d,
        identity,
        FrozenDepthwiseConv2d,
        identity,
        nn.GELU,
        identity,
        PackedConv2d,
        nn.GELU,
    ]


def test_shared_and_watched_modules():
    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(shared, shared, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    seen = []
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    fast = optimize(model)
    assert_same(model, fast)
    assert fast[0] is fast[1]
    assert type(fast[0]) is PackedConv2d
    assert len(seen) == 2
    assert "2: convolution is a subclass, has hooks" in str(optimization_report(fast))


def test_mlp_on_rows_and_on_maps():
    rows, maps = [(12,), (3, 12), (2, 5, 12), (2, 5, 6, 12)], [(2, 12, 5, 6)]
    for use_conv, sizes in ((False, rows), (True, maps)):
        mlp = timm.layers.Mlp(12, 40, use_conv=use_conv)
        fast = optimize(mlp)
        assert isinstance(fast, PackedMLP)
        for size in sizes:
            assert_same(mlp, fast, torch.randn(size))


def test_mlp_on_no_images():
    fast = optimize(timm.layers.Mlp(12, 40))
    assert fast(torch.zeros(0, 5, 6, 12)).shape == (0, 5, 6, 12)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 1, stride=2), "has stride"),
        (nn.Conv2d(4, 4, 1, groups=2), "has 2 groups of 2 channels"),
        (nn.Conv2d(4, 4, 1, padding=1), "pads a 1x1 kernel by"),
        (nn.Conv2d(8, 4, 3), "is dense with a 3x3 kernel"),
        (nn.Conv2d(4, 4, 3, dilation=2), "is dense with a 3x3 kernel"),
        (nn.Conv2d(4, 4, 3, padding_mode="circular", groups=4), "padding_mode='circular'"),
        (nn.Conv2d(4, 8, 3, groups=4), "has 4 groups"),
    ],
)
def test_what_is_left_alone_and_why(conv, reason):
    fast = optimize(nn.Sequential(conv))
    assert reason in optimization_report(fast).left_alone["0"]


@pytest.mark.parametrize("groups", [1, 4])
def test_other_channels_are_refused(groups):
    fast = optimize(nn.Sequential(nn.Conv2d(4, 4, 3 if groups > 1 else 1, groups=groups)))
    assert optimization_report(fast).replaced
    with pytest.raises(ValueError, match="5"):
        fast(torch.zeros(1, 5, 6, 6))


def test_example_input_is_checked(monkeypatch):
    model = network()
    assert_same(model, optimize(model, IMAGE))
    monkeypatch.setattr(PackedConv2d, "forward", lambda self, x, residual=None: 1.01 * x)
    sequence = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(RuntimeError, match="differs from the model by"):
        optimize(sequence, IMAGE)


def test_another_dtype_says_so():
    model = network().double()
    with pytest.warns(UserWarning, match="keeps PyTorch's own layers: .* not torch.float64"):
        fast = optimize(model)
    assert compare(model, fast, IMAGE.double()).relative <= 1e-10
    assert not optimization_report(fast).replaced


def test_moved_to_another_dtype_it_computes_the_same():
    model = network()
    fast = optimize(model).double()
    assert compare(model.double(), fast, IMAGE.double()).relative <= 1e-5


def test_gradients_of_the_input():
    model = network()
    fast, plain = optimize(model), fuse(reparameterize(model))
    gradients = []
    for net in (fast, plain):
        image = IMAGE.clone().requires_grad_()
        net(image)[:, 3].sum().backward()
        gradients.append(image.grad)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[1].std()


def test_large_images_go_through_stem_and_transitions_in_bands(monkeypatch):
    model = network().eval()
    fast = optimize(model)
    assert isinstance(fast.stem, BandedSequential)
    assert isinstance(fast.transitions[0], BandedSequential)
    assert isinstance(fast.get_submodule("stem.1.conv"), FrozenDepthwiseConv2d)
    images = torch.randn(2, 3, 90, 70)
    monkeypatch.setattr(banded, "BAND_BYTES", 9000)
    for each in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with torch.no_grad():
            assert_close(each(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_watched_stem_is_left_alone():
    model = network().eval()
    model.stem.register_forward_hook(lambda *_: None)
    assert type(optimize(model).stem) is nn.Sequential

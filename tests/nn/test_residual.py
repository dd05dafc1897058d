"""Residual blocks in training: some of them in one native call, where products are native."""

from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from replknet import ops
from replknet.models.replknet import ConvFFN, RepLKBlock, RepLKNetStage
from replknet.nn import residual
from replknet.ops.trained_blocks import native_seconds

SIZE = (3, 128, 20, 20)
NATIVE, LAYERS = "_BranchesBackward", "AddBackward0"


def ffn(drop_path=0.0):
    return ConvFFN(128, 2.0, drop_path)


def large(kernel_size=13, small_kernel=5, drop_path=0.0):
    return RepLKBlock(128, kernel_size, small_kernel, 1.0, drop_path)


def stage(pairs=3, drop_path=0.0):
    return RepLKNetStage(128, 7, 3, 1.0, 2.0, [drop_path] * pairs)


def trained(module, seed=0, clamps=False):
    """In training, with norms that are no identities, and behind which ReLUs clamp or not."""
    torch.manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 0.8, 0.1)
            nn.init.normal_(norm.bias, 0.0 if clamps else 6.0, 0.3)
            nn.init.normal_(norm.running_mean)
    return module.train()


def maps(*size, seed=0):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return values.contiguous(memory_format=torch.channels_last).requires_grad_()


def step(module, x, seed=7):
    """Output, and gradients of x and of all parameters."""
    torch.manual_seed(seed)
    output = module(x)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad(output, [x, *module.parameters()], grad)]


def layer_by_layer(module, x):
    with patch("replknet.nn.residual.pays", lambda *_: False):
        return step(module, x)


def in_double(module, x):
    return step(deepcopy(module).double(), x.detach().double().requires_grad_())


SMOOTH, BOTH_ROUNDED, WITH_KINKS = 3e-5, 5e-4, 2e-2
"""Errors, relative to norms: from exact results, between two in float32 (whose gradients in front
of a norm nearly vanish), and with ReLUs that clamp. By their kinks rounding may move an activation,
with all of its gradient, differently with each library and number of threads."""


def assert_near(results, exact, tolerance=SMOOTH):
    largest = max((value.norm() for value in exact[1:]), default=0.0)
    for result, value in zip(results, exact, strict=True):
        assert result.shape == value.shape
        scale = value.norm()
        if scale < 1e-4 * largest:  # of a bias that the next norm takes away again
            scale = largest
        assert (result - value).norm() <= tolerance * scale


BLOCKS = {
    "ffn": ffn,
    "large and small kernel": large,
    "large kernel alone": lambda: large(small_kernel=None),
    "kernel beyond the map": lambda: large(kernel_size=51),
    "stage": stage,
}


@pytest.mark.parametrize("clamps", [False, True])
@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_values_gradients_and_statistics(product_isa, make, clamps):
    module, x = trained(make(), clamps=clamps), maps(*SIZE)
    other = deepcopy(module)
    exact = in_double(module, x)
    results = step(module, x)
    assert results[0].grad_fn.name() == NATIVE
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert_near(results, exact, WITH_KINKS if clamps else SMOOTH)
    assert layer_by_layer(other, x)[0].grad_fn.name() == LAYERS
    for (name, moved), expected in zip(module.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_two_runs_are_the_same_to_the_bit(product_isa):
    module, x = trained(stage()), maps(*SIZE)
    for first, second in zip(step(deepcopy(module), x), step(module, x), strict=True):
        assert torch.equal(first, second)


def test_stochastic_depth_drops_the_same_images(product_isa):
    module, x = trained(stage(drop_path=0.6)), maps(6, 128, 16, 16)
    other = deepcopy(module)
    native = step(module, x)
    assert native[0].grad_fn.name() == NATIVE
    layers = layer_by_layer(other, x)
    assert_near(native, layers, BOTH_ROUNDED)
    dropped = step(module, x, seed=8)[0]
    assert (dropped - native[0]).abs().max() > 0.1  # another seed drops others


def test_a_few_blocks_in_a_call(product_isa):
    module, x = trained(stage(pairs=5)), maps(*SIZE)
    with patch("replknet.nn.residual.add_branches", wraps=residual.add_branches) as call:
        module(x)
        assert [len(arguments[0][1]) for arguments in call.call_args_list] == [4, 4, 2]
        call.reset_mock()
        seen = []
        module.blocks[2].register_forward_hook(lambda *_: seen.append(1))
        module(x)
        assert [len(arguments[0][1]) for arguments in call.call_args_list] == [2, 1, 4, 3]
        assert seen == [1]


def test_second_derivatives(product_isa):
    module, x = trained(large(small_kernel=3)), maps(2, 128, 24, 24)
    factors = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def second(run):
        output = module(x)
        (first,) = torch.autograd.grad((output * factors).sum(), x, create_graph=True)
        assert output.grad_fn.name() == run
        sources = [x, *module.parameters()]
        return torch.autograd.grad(first.square().sum(), sources, materialize_grads=True)

    native = second(NATIVE)
    with patch("replknet.nn.residual.pays", lambda *_: False):
        assert_near(native, second(LAYERS), BOTH_ROUNDED)


def test_statistics_in_double_are_refused_as_by_pytorch(product_isa):
    module = trained(ffn())
    module.pw2.bn.running_mean = module.pw2.bn.running_mean.double()
    with pytest.raises(RuntimeError, match="scalar type"):
        module(maps(*SIZE))


def test_blocks_that_share_a_parameter(product_isa):
    blocks, x = nn.ModuleList(trained(ffn(), seed) for seed in range(2)), maps(*SIZE)
    blocks[1].pw1.conv.weight = blocks[0].pw1.conv.weight
    sources, output = [x, *blocks.parameters()], residual.run_blocks(blocks, x)
    assert output.grad_fn.name() == NATIVE
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    native = torch.autograd.grad(output, sources, grad, retain_graph=True)
    by_pytorch = torch.autograd.grad(output, sources, grad, create_graph=True)
    assert_near(native, by_pytorch, BOTH_ROUNDED)
    with patch("replknet.nn.residual.pays", lambda *_: False):
        layers = torch.autograd.grad(residual.run_blocks(blocks, x), sources, grad)
    assert_near(native, layers, BOTH_ROUNDED)


def test_gradients_of_a_frozen_input(product_isa):
    module, x = trained(ffn()), maps(*SIZE).detach()
    module(x).square().sum().backward()
    gradient = module.pw1.conv.weight.grad.clone()
    module.zero_grad()
    with patch("replknet.nn.residual.pays", lambda *_: False):
        module(x).square().sum().backward()
    assert_near([gradient], [module.pw1.conv.weight.grad], BOTH_ROUNDED)


def test_checkpointing_moves_statistics_once(product_isa):
    module, x = trained(stage(pairs=1)), maps(*SIZE)
    other = deepcopy(module)
    other.grad_checkpointing = True
    plain = step(module, x)
    with patch("replknet.nn.residual.add_branches", wraps=residual.add_branches) as call:
        assert_near(step(other, x), plain)
        assert call.call_count == 4
    for moved, expected in zip(other.buffers(), module.buffers(), strict=True):
        assert torch.equal(moved, expected)


def test_statistics_that_are_means_over_batches(product_isa):
    module, x = trained(ffn()), maps(*SIZE)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    other = deepcopy(module)
    for seed in range(3):
        x = maps(*SIZE, seed=seed)
        step(module, x)
        layer_by_layer(other, x)
    for moved, expected in zip(module.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_norms_without_running_statistics(product_isa, momentum):
    module, x = trained(ffn()), maps(*SIZE)
    module.pw1.bn = nn.BatchNorm2d(256, momentum=momentum, track_running_stats=False)
    results = step(module, x)
    assert results[0].grad_fn.name() == NATIVE
    assert_near(results, in_double(module, x))


def change(module, how):
    """Something that a native call would not honour, or is not made for."""
    if how == "norm in evaluation":
        module.pw2.bn.eval()
    elif how == "frozen parameter":
        module.pw1.conv.weight.requires_grad_(False)
    elif how == "other norm":
        module.pw1.bn = nn.GroupNorm(4, 128)
    elif how == "other convolution":
        module.pw2.conv = nn.Conv2d(128, 128, 1, bias=False)
    elif how == "dilation":
        for unit, padding in (
            (module.large_kernel.small_conv, 4),
            (module.large_kernel.lkb_origin, 12),
        ):
            unit.conv.dilation, unit.conv.padding = (2, 2), (padding, padding)
    elif how == "hook":
        module.large_kernel.small_conv.conv.register_forward_hook(lambda *_: None)
    elif how == "hook of a unit":
        module.pw1.register_forward_hook(lambda *_: None)
    elif how == "other stochastic depth":
        module.drop_path = nn.Dropout2d(0.5)
    return module


CHANGES = (
    "norm in evaluation",
    "frozen parameter",
    "other norm",
    "other convolution",
    "dilation",
    "hook",
    "hook of a unit",
    "other stochastic depth",
)


@pytest.mark.parametrize("how", CHANGES)
def test_layer_by_layer_where_blocks_are_others(product_isa, how):
    module, x = trained(large()), maps(*SIZE)
    assert module(x).grad_fn.name() == NATIVE
    assert change(module, how)(x).grad_fn.name() == LAYERS


def test_layer_by_layer_where_calls_are_others(product_isa):
    module, x = trained(large()), maps(*SIZE)
    with torch.no_grad():
        assert module(x).grad_fn is None
    assert module(x.contiguous()).grad_fn.name() == LAYERS
    assert module.double()(x.double()).grad_fn.name() == LAYERS
    module.float()
    with torch.autocast("cpu"):
        assert module(x).grad_fn.name() == LAYERS
    with ops.use("torch_fft"):
        assert module(x).grad_fn.name() == LAYERS
    with ops.use("direct"):
        assert module(x).grad_fn.name() == NATIVE
    assert module(x[:, :, :2, :2]).grad_fn.name() == LAYERS  # small products are a library's
    assert module.eval()(x).grad_fn.name() == LAYERS


def test_the_backward_pass_obeys_use(product_isa):
    module, x = trained(large()), maps(*SIZE)
    output = module(x)
    with ops.use("torch"), patch("replknet.ops.trained_blocks.library") as native:
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        assert not native.called
    (native,) = torch.autograd.grad(module(x).square().sum(), x)
    assert_near([gradient], [native], BOTH_ROUNDED)


def test_operations_are_counted_layer_by_layer(product_isa):
    module, x = trained(ffn()), maps(*SIZE)
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 3 * 400 * 128 * 256


def test_a_failing_allocation_is_an_error(product_isa):
    module, x = trained(ffn()), maps(*SIZE)
    with patch("replknet.ops.trained_blocks.library") as native:
        native().rk_branch_map_floats.return_value = 1
        native().rk_branches_forward.return_value = 2
        with pytest.raises(MemoryError, match="workspace"):
            module(x)


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_native_seconds_by_kind(product_isa):
    module, x = trained(stage(pairs=1)), maps(*SIZE)
    with native_seconds() as times, Watcher():
        output = step(module, x)[0]
    assert output.grad_fn.name() == NATIVE  # also under a mode that watches operators
    assert [[size for size, _ in time.kernels] for time in times] == 2 * [[(7, 7), (3, 3)], []]
    for time in times:
        kinds = (time.norms, time.products, *(seconds for _, seconds in time.kernels))
        assert all(0 < seconds < 1 for seconds in kinds)
    step(module, x)
    assert len(times) == 4

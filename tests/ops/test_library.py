"""The operator inside PyTorch's machinery."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from replknet.nn import DepthwiseConv2d
from replknet.ops import _binary, decompositions, depthwise_conv2d, depthwise_conv2d_relu

FORMATS = (torch.contiguous_format, torch.channels_last)
SCRIPT_WARNING = "ignore:.torch.jit.script:FutureWarning"  # PyTorch's own, in forward mode
# opcheck reads the gradient of tensors that are not leaves.
LEAF_WARNING = r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"


def arguments(format=torch.contiguous_format):
    torch.manual_seed(0)
    input = torch.randn(2, 6, 9, 11).contiguous(memory_format=format).requires_grad_()
    return input, torch.randn(6, 1, 5, 4, requires_grad=True), torch.randn(6, requires_grad=True)


def test_gradients_of_mixed_dtypes_are_refused():
    """Their memory would be read as what it is not."""
    input, weight, _ = (tensor.detach() for tensor in arguments())
    grad_output = torch.randn(2, 6, 9, 11, dtype=torch.float16)
    geometry = (1, 1), (2, 2, 1, 2), (1, 1)
    with pytest.raises(ValueError, match=r"grad_output is .*float16 but weight is .*float32"):
        torch.ops.replknet.depthwise_conv2d_grad_input(
            grad_output, weight, (9, 11), *geometry, False, "auto"
        )
    with pytest.raises(ValueError, match=r"grad_output is .*float16 but input is .*float32"):
        torch.ops.replknet.depthwise_conv2d_grad_weight(
            grad_output, input, (5, 4), *geometry, "auto"
        )


@pytest.mark.skipif(_binary.library is None, reason="there is no native core")
@pytest.mark.parametrize("algorithm", ["direct", "fft"])
def test_another_default_device(algorithm):
    """Memory for results is on the CPU, wherever new tensors go."""
    results = []
    for device in ("cpu", "meta"):
        input, weight, bias = arguments()
        with torch.device(device):
            output = depthwise_conv2d(input, weight, bias, algorithm=algorithm)
            output.backward(output.detach())
        results.append((output, input.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings(SCRIPT_WARNING)
@pytest.mark.parametrize("derive", [torch.func.grad, torch.func.jacfwd, torch.func.jacrev])
def test_derivatives_by_torch_func(derive):
    input, weight, bias = (tensor.detach() for tensor in arguments())
    found, expected = (
        derive(lambda x, f=f: f(x, weight, bias).square().sum())(input)
        for f in (
            lambda *tensors: depthwise_conv2d(*tensors, padding=(2, 2, 1, 2)),
            lambda x, w, b: F.conv2d(F.pad(x, (1, 2, 2, 2)), w, b, groups=6),
        )
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match=r"'fft' has no derivatives for torch\.func"):
        derive(lambda x: depthwise_conv2d(x, weight, algorithm="fft").sum())(input)


@pytest.mark.filterwarnings(SCRIPT_WARNING)
def test_forward_mode_differentiation():
    input, weight, _ = (tensor.detach() for tensor in arguments())
    tangent = torch.randn_like(input)
    with forward_ad.dual_level():
        output = depthwise_conv2d(forward_ad.make_dual(input, tangent), weight)
        found = forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(found, depthwise_conv2d(tangent, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(LEAF_WARNING)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_opcheck(format, stride):
    input, weight, bias = arguments(format)
    geometry = [stride, (2, 2, 1, 2), (1, 1)]
    forward = torch.ops.replknet.depthwise_conv2d.default
    for relu in (False, True):
        torch.library.opcheck(forward, (input, weight, bias, *geometry, relu, "auto"))
    grad_output = torch.randn_like(forward(input, weight, None, *geometry, False, "auto"))
    grad_output = grad_output.detach().requires_grad_()
    torch.library.opcheck(
        torch.ops.replknet.depthwise_conv2d_grad_input.default,
        (grad_output, weight, (9, 11), *geometry, format == torch.channels_last, "auto"),
    )
    torch.library.opcheck(
        torch.ops.replknet.depthwise_conv2d_grad_weight.default,
        (grad_output, input, (5, 4), *geometry, "auto"),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    layer = DepthwiseConv2d(6, 6, 7, padding=3)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (9, 12):
        input = torch.randn(2, 6, size, size, requires_grad=True)
        expected = torch.autograd.grad(layer(input).square().sum(), [input, layer.weight])
        got = torch.autograd.grad(compiled(input).square().sum(), [input, layer.weight])
        torch.testing.assert_close(got, expected)


def test_exports_with_dynamic_sizes_and_decomposes():
    layer = DepthwiseConv2d(6, 6, (5, 4), padding="same").eval()
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height")
    program = torch.export.export(
        layer, (torch.randn(2, 6, 9, 9),), dynamic_shapes=({0: batch, 2: height},)
    )
    input = torch.randn(3, 6, 14, 9)
    torch.testing.assert_close(program.module()(input), layer(input))
    plain = program.run_decompositions(decompositions())
    assert "replknet" not in str(plain.graph)
    torch.testing.assert_close(plain.module()(input), layer(input), rtol=1e-5, atol=1e-5)


def test_decomposition_computes_the_same():
    input, weight, bias = arguments()
    (decomposed,) = decompositions().values()
    for padding in ((2, 2, 1, 2), (2, 2, 1, 1)):
        torch.testing.assert_close(
            decomposed(input, weight, bias, [1, 1], list(padding), [1, 1], True, "auto"),
            depthwise_conv2d_relu(input, weight, bias, padding=padding),
        )


@pytest.mark.parametrize("input_dim", [None, 0, 2])
@pytest.mark.parametrize("weight_dim", [None, 0, 3])
@pytest.mark.parametrize("bias_dim", [None, 1])
def test_vmap_agrees_with_a_loop(input_dim, weight_dim, bias_dim):
    if input_dim is weight_dim is bias_dim is None:
        return
    input, weight, bias = (tensor.detach() for tensor in arguments())
    stacked = [
        tensor if dim is None else torch.stack([tensor, 2 * tensor, -tensor], dim)
        for tensor, dim in zip(
            (input, weight, bias), (input_dim, weight_dim, bias_dim), strict=True
        )
    ]
    in_dims = (input_dim, weight_dim, bias_dim)
    got = vmap(depthwise_conv2d, in_dims)(*stacked)
    for i, part in enumerate(got):
        each = [t if d is None else t.select(d, i) for t, d in zip(stacked, in_dims, strict=True)]
        torch.testing.assert_close(part, depthwise_conv2d(*each), rtol=1e-5, atol=1e-5)


def test_vmap_over_gradients_agrees_with_a_loop():
    input, weight, _ = arguments()
    output = depthwise_conv2d(input, weight)
    directions = torch.randn(3, *output.shape)

    def pull_back(direction):
        return torch.autograd.grad(output, [input, weight], direction, retain_graph=True)

    for got, expected in zip(
        vmap(pull_back)(directions), zip(*map(pull_back, directions), strict=True), strict=True
    ):
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_autocast_casts_as_conv2d_does():
    input, weight, bias = arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = depthwise_conv2d(input, weight, bias)
        assert output.dtype == torch.bfloat16
        assert depthwise_conv2d(input.double(), weight.double()).dtype == torch.float64
    output.float().sum().backward()
    assert {t.grad.dtype for t in (input, weight, bias)} == {torch.float32}
    torch.testing.assert_close(
        output.float(), depthwise_conv2d(input, weight, bias), rtol=0.1, atol=0.1
    )


def test_runs_on_the_meta_device():
    input, weight, bias = (tensor.detach().to("meta") for tensor in arguments())
    output = depthwise_conv2d(input.to(memory_format=torch.channels_last), weight, bias)
    assert output.device.type == "meta"
    assert output.shape == (2, 6, 9, 11)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_operations_are_counted():
    """Forward as those of F.conv2d. PyTorch forgets the groups in the backward pass."""
    input, weight, _ = arguments()
    with FlopCounterMode(display=False) as forward:
        output = depthwise_conv2d(input, weight, padding=2, algorithm="torch")
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    with FlopCounterMode(display=False) as reference:
        torch.nn.functional.conv2d(input, weight, padding=2, groups=6)
    assert forward.get_total_flops() == reference.get_total_flops() == 2 * 2 * 6 * 9 * 12 * 20
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_deterministic_mode_and_equal_bits():
    input, weight, bias = arguments()
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(3):
            output = depthwise_conv2d(input, weight, bias)
            results.append((output, *torch.autograd.grad(output.sin().sum(), [input, weight])))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_keeps_only_what_the_wanted_gradients_need():
    saved = []
    input, weight, _ = arguments()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda x: x):
        depthwise_conv2d(input.detach(), weight, algorithm="torch")
        assert saved == [input.shape]
        depthwise_conv2d(input, weight.detach(), algorithm="torch")
        assert saved == [input.shape, weight.shape]


def test_negated_views_count_with_their_sign():
    input, weight, _ = (tensor.detach() for tensor in arguments())
    negated = torch.view_as_complex(torch.stack([input, input], -1)).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(
        depthwise_conv2d(negated, weight), depthwise_conv2d(-input, weight), rtol=0, atol=0
    )


def test_modes_and_subclasses_see_the_operator():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    input, weight, bias = (tensor.detach() for tensor in arguments())
    operator = torch.ops.replknet.depthwise_conv2d.default
    depthwise_conv2d(input, weight, bias)
    assert seen == []
    with Watch():
        depthwise_conv2d(input, weight, bias)
    assert operator in seen
    seen.clear()
    depthwise_conv2d(input.as_subclass(Watched), weight, bias)
    assert operator in seen
    with torch.profiler.profile() as profile:
        depthwise_conv2d(input, weight, bias)
    assert "replknet::depthwise_conv2d" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("format", FORMATS)
def test_second_derivatives_of_the_bare_call(format):
    input, weight, bias = (tensor.detach().double() for tensor in arguments(format))
    tensors = [tensor.requires_grad_() for tensor in (input[:1, :2], weight[:2], bias[:2])]
    assert torch.autograd.gradgradcheck(lambda *t: depthwise_conv2d(*t, padding=(2, 1)), tensors)

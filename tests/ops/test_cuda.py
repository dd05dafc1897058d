"""The operator on a CUDA GPU: values, gradients, and PyTorch's machinery around it."""

import pytest
import torch
from depthwise_oracle import oracle, relative_error

from replknet.ops import depthwise_conv2d, depthwise_conv2d_relu, explain, problem_of, use
from replknet.ops.algorithm import ALGORITHMS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU, and PyTorch sees none"
)

ALGORITHMS_HERE = ("auto", "triton", "torch_fft", "torch")
FORMATS = (torch.contiguous_format, torch.channels_last)
# Of the largest value. PyTorch's own kernels sum 961 taps one after the other.
TOLERANCE = {torch.float32: 5e-7, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TORCH_TOLERANCE = TOLERANCE | {torch.float32: 5e-6}
WEIGHT_FACTOR = 4  # sums over the batch and the map
# batch, channels, map, kernel, padding
SIZES = [
    (2, 8, (56, 56), (31, 31), "same"),
    (33, 4, (28, 28), (29, 29), "same"),
    (4, 8, (14, 14), (27, 27), "same"),
    (40, 8, (7, 7), (13, 13), "same"),
    (1, 1, (20, 70), (6, 9), (1, 4, 2, 3)),
    (2, 3, (10, 40), (3, 4), (5, 0, 0, 9)),
    (2, 3, (33, 47), (51, 5), "same"),
    (3, 2, (40, 100), (1, 250), "same"),
    (2, 3, (60, 150), (7, 31), "valid"),
]


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    """PyTorch computes one channel as an ordinary convolution, by default in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def arguments(batch, channels, size, kernel_size, dtype, format=torch.contiguous_format):
    torch.manual_seed(0)
    input = torch.randn(batch, channels, *size, device="cuda", dtype=dtype)
    weight = torch.randn(channels, 1, *kernel_size, device="cuda", dtype=dtype)
    bias = torch.randn(channels, device="cuda", dtype=dtype)
    return input.contiguous(memory_format=format), weight, bias


@pytest.mark.parametrize("algorithm", ALGORITHMS_HERE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("batch", "channels", "size", "kernel_size", "padding"), SIZES)
def test_agrees_with_the_definition(
    algorithm, dtype, format, batch, channels, size, kernel_size, padding
):
    tensors = arguments(batch, channels, size, kernel_size, dtype, format)
    input, weight, bias = (tensor.requires_grad_() for tensor in tensors)
    output = depthwise_conv2d(input, weight, bias, padding=padding, algorithm=algorithm)
    grad_output = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (input, weight, bias), grad_output)
    assert output.is_contiguous(memory_format=format)
    assert {output.dtype, *(gradient.dtype for gradient in gradients)} == {dtype}
    expected = oracle(
        input.cpu(), weight.cpu(), grad_output.cpu(), (1, 1),
        problem_of(input, weight, padding=padding).padding, (1, 1),
    )  # fmt: skip
    with_bias = expected[0] + bias.detach().double().cpu()[:, None, None]
    own = algorithm in ("triton", "torch_fft")
    tolerance = (TOLERANCE if own else TORCH_TOLERANCE)[dtype]
    assert relative_error(output.cpu(), with_bias) <= tolerance
    assert relative_error(gradients[0].cpu(), expected[1]) <= tolerance
    assert relative_error(gradients[1].cpu(), expected[2]) <= WEIGHT_FACTOR * tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_triton_gives_equal_bits_and_each_image_its_own(dtype):
    input, weight, bias = arguments(9, 4, (28, 28), (29, 29), dtype)
    weight.requires_grad_()
    outputs, gradients = [], []
    for _ in range(2):
        output = depthwise_conv2d(input, weight, bias, algorithm="triton")
        outputs.append(output)
        gradients += torch.autograd.grad(output, weight, torch.ones_like(output))
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


def test_triton_keeps_the_range_of_float32():
    input, weight, _ = arguments(2, 4, (20, 20), (13, 13), torch.float32)
    expected = depthwise_conv2d(input.double(), weight.double()).cpu()
    for scale in (1e-30, 1e30):
        output = depthwise_conv2d(scale * input, weight, algorithm="triton")
        assert relative_error(output.cpu().double() / scale, expected) <= 1e-6


def test_relu_is_folded():
    input, weight, bias = arguments(2, 4, (20, 20), (13, 13), torch.float32)
    output = depthwise_conv2d_relu(input, weight, bias, algorithm="triton")
    separate = depthwise_conv2d(input, weight, bias, algorithm="triton").relu()
    assert torch.equal(output, separate)


def test_auto_is_explained():
    input, weight, _ = arguments(32, 128, (56, 56), (31, 31), torch.float32)
    explanation = explain(problem_of(input, weight))
    assert explanation.choice == "triton"
    assert "not measured" not in str(explanation)


def test_plain_calls_go_past_the_operator():
    input, weight, _ = arguments(2, 4, (28, 28), (29, 29), torch.float32)
    output = depthwise_conv2d(input, weight.requires_grad_(), algorithm="triton")
    assert "DepthwiseConvolution" in output.grad_fn.name()


def test_use_reaches_the_backward_pass():
    """PyTorch runs it in another thread."""
    input, weight, _ = arguments(2, 4, (28, 28), (29, 29), torch.float16)
    weight.requires_grad_()
    gradients = {}
    for name in ("torch", "triton"):
        output = depthwise_conv2d(input, weight, algorithm=name)
        expected = torch.autograd.grad(output, weight, torch.ones_like(output))[0]
        with use(name):
            output = depthwise_conv2d(input, weight)
            gradients[name] = torch.autograd.grad(output, weight, torch.ones_like(output))[0]
        assert torch.equal(gradients[name], expected)
    assert not torch.equal(*gradients.values())


# The compiler of some versions of PyTorch uses its own deprecated functions.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("algorithm", ALGORITHMS_HERE)
def test_compiles_whole(algorithm):
    input, weight, bias = (
        tensor.requires_grad_() for tensor in arguments(2, 4, (20, 20), (13, 13), torch.float32)
    )

    def loss(input, weight, bias):
        return (depthwise_conv2d(input, weight, bias, algorithm=algorithm) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(input, weight, bias), (input, weight, bias))
    gradients = torch.autograd.grad(compiled(input, weight, bias), (input, weight, bias))
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_training_step_is_captured_in_a_cuda_graph(dtype):
    input, weight, bias = arguments(2, 4, (28, 28), (29, 29), dtype)
    weight.requires_grad_()

    def step():
        with use("triton"):
            output = depthwise_conv2d(input, weight, bias)
            return torch.autograd.grad(output, weight, output.detach())[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step()
    input.copy_(torch.randn_like(input))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(gradient, step())


def test_autocast_reaches_the_algorithm():
    input, weight, bias = (
        tensor.requires_grad_() for tensor in arguments(2, 4, (20, 20), (13, 13), torch.float32)
    )
    with torch.autocast("cuda", torch.bfloat16):
        output = depthwise_conv2d(input, weight, bias, algorithm="triton")
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.float().sum(), (input, weight, bias))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_second_derivatives():
    input, weight, _ = (
        tensor.requires_grad_() for tensor in arguments(1, 2, (9, 9), (5, 5), torch.float32)
    )

    def penalty(input, weight, algorithm):
        output = depthwise_conv2d(input, weight, algorithm=algorithm)
        (gradient,) = torch.autograd.grad((output**3).sum(), input, create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), (input, weight))

    with use("triton"):
        ours = penalty(input, weight, "auto")
    exact = penalty(input.double(), weight.double(), "torch")
    for gradient, other in zip(ours, exact, strict=True):
        assert relative_error(gradient.cpu(), other.detach().cpu()) <= 1e-5


def test_operators_are_registered_right():
    input, weight, bias = arguments(2, 4, (12, 12), (7, 7), torch.float32)
    full = ([1, 1], [3, 3, 3, 3], [1, 1])
    torch.library.opcheck(
        torch.ops.replknet.depthwise_conv2d.default,
        (input.requires_grad_(), weight.requires_grad_(), bias, *full, False, "triton"),
    )


@pytest.mark.parametrize("algorithm", ["direct", "fft"])
def test_the_native_core_refuses_gpus(algorithm):
    input, weight, _ = arguments(1, 2, (9, 9), (5, 5), torch.float32)
    assert algorithm in ALGORITHMS
    with pytest.raises(NotImplementedError, match="cannot compute"):
        depthwise_conv2d(input, weight, algorithm=algorithm)


def test_arguments_on_two_devices_are_refused():
    input, weight, _ = arguments(1, 2, (9, 9), (5, 5), torch.float32)
    with pytest.raises(ValueError, match="one device"):
        depthwise_conv2d(input, weight.cpu())


def test_an_accelerated_model_moves_to_the_gpu():
    import replknet

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.Conv2d(8, 8, 31, padding=15, groups=8),
        torch.nn.BatchNorm2d(8),
    )
    images = torch.randn(2, 3, 40, 40)
    fast = replknet.accelerate(model).cuda().eval()
    expected = model.double().eval()(images.double())
    assert relative_error(fast(images.cuda()).cpu(), expected.detach()) <= 1e-5

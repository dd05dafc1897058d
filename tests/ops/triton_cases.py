"""Small convolutions in Triton's interpreter: run as a program, prints its errors as JSON.

A program of its own, because ``TRITON_INTERPRET=1`` must be set before Triton is imported.
"""

import json
import sys

import torch
from depthwise_oracle import oracle, relative_error

from replknet.ops import triton_conv, triton_tiles
from replknet.ops.arguments import problem_of

# batch, channels, map, kernel, padding
CASES = {
    "odd": (2, 2, (9, 11), (5, 3), "same"),
    "square": (3, 1, (16, 16), (7, 7), "same"),
    "reaches everywhere": (1, 2, (7, 7), (13, 13), 6),
    "even, uneven padding": (2, 1, (20, 70), (6, 9), (1, 4, 2, 3)),
    "padding beyond the kernel": (2, 1, (10, 40), (3, 4), (5, 0, 0, 9)),
    "many images": (70, 1, (5, 6), (3, 3), "same"),
    "several tiles": (1, 1, (6, 80), (3, 31), "same"),
    "one row": (2, 1, (1, 24), (1, 9), "same"),
    "one column": (2, 1, (24, 1), (9, 1), "valid"),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def case(batch, channels, size, kernel_size, padding, dtype, scale=1.0):
    """Arguments, the three problems, and a gradient of the output."""
    torch.manual_seed(0)
    input = (scale * torch.randn(batch, channels, *size)).to(dtype)
    weight = torch.randn(channels, 1, *kernel_size).to(dtype)
    problems = [
        problem_of(input, weight, padding=padding, pass_=pass_)
        for pass_ in ("forward", "grad_input", "grad_weight")
    ]
    return input, weight, problems, torch.randn(problems[0].output_shape).to(dtype)


def errors(*arguments):
    """Relative errors of the output and both gradients."""
    input, weight, problems, grad = case(*arguments)
    expected = oracle(input, weight, grad, (1, 1), problems[0].padding, (1, 1))
    results = compute(input, weight, problems, grad)
    assert {result.dtype for result in results} == {input.dtype}
    return [relative_error(*pair) for pair in zip(results, expected, strict=True)]


def compute(input, weight, problems, grad):
    algorithm = triton_conv.TritonConv()
    forward, grad_input, grad_weight = problems
    return (
        algorithm.forward(forward, input, weight, None, False),
        algorithm.grad_input(grad_input, grad, weight),
        algorithm.grad_weight(grad_weight, grad, input),
    )


def bias_and_relu():
    """Error, and whether a NaN survives the clamp."""
    input, weight, problems, grad = case(*CASES["odd"], torch.float32)
    bias = torch.tensor([1.5, -0.5])
    output = triton_conv.TritonConv().forward(problems[0], input, weight, bias, True)
    expected = oracle(input, weight, grad, (1, 1), problems[0].padding, (1, 1))[0]
    error = relative_error(output, (expected + bias.double()[:, None, None]).relu())
    input[0, 0] = float("nan")
    output = triton_conv.TritonConv().forward(problems[0], input, weight, bias, True)
    return error, bool(output[0, 0].isnan().all()), bool(output[1:].isfinite().all())


def takes_turns():
    """Whether channels that do not fit the workspace at once give the same bits."""
    arguments = case(2, 3, (9, 11), (5, 3), "same", torch.float32)
    at_once = compute(*arguments)
    triton_tiles.WORKSPACE_BYTES = 1
    in_turn = compute(*arguments)
    return all(torch.equal(*pair) for pair in zip(at_once, in_turn, strict=True))


def main():
    results = {
        f"{name}, {dtype}": errors(*sizes, DTYPES[dtype])
        for name, sizes in CASES.items()
        for dtype in DTYPES
    }
    results["huge"] = errors(*CASES["odd"], torch.float32, 1e30)
    results["tiny"] = errors(*CASES["odd"], torch.float32, 1e-30)
    results["bias and relu"] = bias_and_relu()
    results["takes turns"] = takes_turns()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

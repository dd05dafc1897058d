"""What "auto" takes on CUDA. Needs no GPU: the rule reads only sizes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from replknet.ops import problem_of, triton_conv
from replknet.ops.algorithm import Support
from replknet.ops.choose import _cheapest, choose, pytorch_alone_is_faster
from replknet.ops.cuda_choice import fastest, pytorch_layout, work

ALL = {"triton", "torch_fft", "torch"}


def problem(batch, channels, size, kernel_size, **changes):
    input = torch.empty(batch, channels, size, size, device="meta")
    weight = torch.empty(channels, 1, kernel_size, kernel_size, device="meta")
    return replace(problem_of(input, weight), device="cuda", **changes)


STAGE_1 = problem(32, 128, 56, 31)


@pytest.mark.parametrize("pass_", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_large_kernels_go_to_triton_and_small_work_to_pytorch(pass_, dtype, layout):
    options = {"pass_": pass_, "dtype": dtype, "layout": layout}
    assert fastest(replace(STAGE_1, **options), ALL) == "triton"
    assert fastest(problem(1, 64, 7, 13, **options), ALL) == "torch"
    assert fastest(problem(32, 128, 56, 3, **options), ALL) == "torch"


def test_without_triton_long_sums_go_to_the_transform():
    able = {"torch_fft", "torch"}
    assert fastest(STAGE_1, able) == "torch_fft"
    assert fastest(problem(32, 128, 56, 13), able) == "torch"
    assert fastest(replace(STAGE_1, dtype=torch.float64), able) == "torch"
    assert fastest(replace(STAGE_1, dilation=(2, 2), padding=(30,) * 4), able) == "torch"


@pytest.mark.parametrize(
    ("size", "kernel_size", "options"),
    [
        (9, (5, 4), {"padding": (2, 1)}),
        (9, (13, 3), {"padding": (6, 9, 1, 0)}),
        (11, (5, 3), {"stride": (2, 3), "padding": 4}),
        (11, (3, 4), {"dilation": (3, 2), "padding": 5}),
    ],
)
def test_work_leaves_padding_out(size, kernel_size, options):
    input, weight = torch.ones(2, 3, size, size), torch.ones(3, 1, *kernel_size)
    forward = problem_of(input, weight, **options)
    top, bottom, left, right = forward.padding
    padded = F.pad(input, (left, right, top, bottom))
    output = F.conv2d(padded, weight, None, forward.stride, 0, forward.dilation, 3)
    assert work(forward) == output.sum()
    everywhere = output.numel() * kernel_size[0] * kernel_size[1]
    assert work(replace(forward, pass_="grad_weight")) == everywhere


def test_pytorch_computes_large_kernels_in_nchw():
    small = problem(32, 128, 56, 7, layout="NHWC")
    assert pytorch_layout(small) == "NHWC"
    assert pytorch_layout(replace(small, pass_="grad_weight")) == "NCHW"
    assert pytorch_layout(replace(small, pass_="grad_weight", dtype=torch.float16)) == "NHWC"
    assert pytorch_layout(problem(32, 128, 56, 9, layout="NHWC")) == "NCHW"


def test_auto_follows_the_rule_and_leaves_small_calls_to_pytorch(monkeypatch):
    monkeypatch.setattr(triton_conv, "_machine_support", lambda: Support(True))
    _cheapest.cache_clear()
    assert choose(STAGE_1).name == "triton"
    small = problem(1, 64, 7, 5)
    assert choose(small).name == "torch"
    assert pytorch_alone_is_faster([small])
    assert not pytorch_alone_is_faster([small, STAGE_1])
    assert not pytorch_alone_is_faster([problem(1, 64, 7, 9, layout="NHWC")])
    _cheapest.cache_clear()

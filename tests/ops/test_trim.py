"""Taps that only ever meet padding are left out, and nothing else."""

import torch
from depthwise_oracle import oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from replknet.ops.problem import Problem
from replknet.ops.trim import Taps, trim


def problem(size, kernel, stride, padding, dilation):
    return Problem(
        "forward", 1, 1, size, 3, (kernel, 3), (stride, 1), (*padding, 1, 1), (dilation, 1),
        torch.float32, "NCHW", "cpu",
    )  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 9),
    kernel=st.integers(1, 24),
    stride=st.integers(1, 4),
    padding=st.tuples(st.integers(0, 24), st.integers(0, 24)),
    dilation=st.integers(1, 4),
)
def test_trimming_does_not_change_the_output(size, kernel, stride, padding, dilation):
    if size + sum(padding) < dilation * (kernel - 1) + 1:
        return
    whole = problem(size, kernel, stride, padding, dilation)
    part, taps = trim(whole)
    assert part.output_size == whole.output_size
    assert min(part.padding) >= 0
    input, weight = torch.randn(1, 1, size, 3), torch.randn(1, 1, kernel, 3)
    grad_output = torch.randn(1, 1, *whole.output_size)
    cut = weight[:, :, taps.top : taps.bottom, taps.left : taps.right]
    expected = oracle(input, weight, grad_output, whole.stride, whole.padding, whole.dilation)
    got = oracle(input, cut, grad_output, part.stride, part.padding, part.dilation)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2][:, :, taps.top : taps.bottom])
    outside = expected[2].clone()
    outside[:, :, taps.top : taps.bottom] = 0
    assert outside.abs().max() == 0


def test_a_large_kernel_on_a_small_map_shrinks_to_what_meets_it():
    part, taps = trim(problem(7, 31, 1, (15, 15), 1))
    assert part.kernel_size == (13, 3)
    assert part.padding == (6, 6, 1, 1)
    assert taps == Taps(9, 22, 0, 3)
    assert trim(problem(56, 31, 1, (15, 15), 1))[1] == Taps(0, 31, 0, 3)

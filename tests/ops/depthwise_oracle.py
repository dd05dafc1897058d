"""The three passes of a depthwise convolution from their definition, in numpy and float64."""

from __future__ import annotations

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor


def oracle(
    input: Tensor,
    weight: Tensor,
    grad_output: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input, gradient of the weight."""
    x, w, g = (tensor.detach().double().numpy() for tensor in (input, weight[:, 0], grad_output))
    top, bottom, left, right = padding
    (sh, sw), (dh, dw) = stride, dilation
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = (dh * (w.shape[1] - 1) + 1, dw * (w.shape[2] - 1) + 1)
    windows = sliding_window_view(padded, reach, axis=(2, 3))[:, :, ::sh, ::sw, ::dh, ::dw]
    output = np.einsum("ncyxkl,ckl->ncyx", windows, w)
    grad_weight = np.einsum("ncyxkl,ncyx->ckl", windows, g)[:, None]
    grad_padded = np.zeros_like(padded)
    for k in range(w.shape[1]):
        for m in range(w.shape[2]):
            rows = slice(k * dh, k * dh + sh * (g.shape[2] - 1) + 1, sh)
            columns = slice(m * dw, m * dw + sw * (g.shape[3] - 1) + 1, sw)
            grad_padded[:, :, rows, columns] += g * w[:, k, m, None, None]
    grad_input = grad_padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return torch.from_numpy(output), torch.from_numpy(grad_input), torch.from_numpy(grad_weight)


def relative_error(result: Tensor, expected: Tensor, floor: Tensor | None = None) -> float:
    """Largest error over the largest expected value.

    ``floor`` gives the scale when that is larger: the norm of the summed numbers, where few sums
    of random signs may all happen to be close to zero.
    """
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max()
    if floor is not None:
        scale = torch.maximum(scale, floor.detach().double().flatten(1).norm(dim=1).max())
    return float((result.detach().double() - expected).abs().max() / scale.clamp_min(1e-30))

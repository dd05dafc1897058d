"""GPU kernels of algorithm "triton": depthwise convolution as products with Toeplitz matrices.

A row of outputs is the sum over the kernel's rows ``ky`` of a row of the input times a matrix
``T[i, j] = w[ky, i - j + left]``. One product serves ``BY`` rows of outputs at once: its columns are
(row of outputs, column of outputs), and its steps go over the rows of the input that these read.
The rows of the product are the images of the batch and, when those are few, blocks of rows.

Tensor cores multiply 16-bit numbers and add in float32, cutting off what does not fit. A float32
number is split into two float16 (22 bits) after scaling by a power of two, and each product is
three of theirs; short chains of them are added to the sum with proper rounding.

Integers whose name ends in 8 count groups of eight elements: the compiler then knows that rows
start at 16-byte boundaries.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_of(largest):
    """Power of two that brings the largest magnitude into [2^14, 2^15)."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 15)
    return ((268 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unscale_of(largest):
    """Inverse of ``scale_of``; NaN where the magnitude is none or infinite."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 15)
    inverse = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 255, float("nan"), inverse)


@triton.jit
def pack_rows(
    input,  # (rows, width), contiguous
    output,  # (TERMS, rows, pitch), contiguous
    largest,  # (planes,), read with TERMS == 2
    rows,
    height,
    width,
    pitch,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Pad rows with zeros to ``pitch`` columns and, with two terms, split float32 into float16."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None]
    value = tl.load(
        input + row[:, None] * width + column[None, :],
        inside & (column < width)[None, :],
        other=0.0,
    )
    target = output + row[:, None] * pitch + column[None, :]
    inside = inside & (column < pitch)[None, :]
    if TERMS == 2:
        value = value * scale_of(tl.load(largest + row // height, row < rows, other=1.0))[:, None]
        high = value.to(tl.float16)
        low = (value - high.to(tl.float32)).to(tl.float16)
        tl.store(target, high, inside)
        tl.store(target + rows.to(tl.int64) * pitch, low, inside)
    else:
        tl.store(target, value, inside)


@triton.jit
def filter_matrices(
    weight,  # (channels, kernel_h, kernel_w), contiguous
    table,  # (TERMS, channels, kernel_h + 2 * BY - 2, chunks * BK, BN)
    largest,  # (channels,), read with TERMS == 2
    channels,
    kernel_h,
    kernel_w,
    left,
    chunk_low,
    chunks,
    FLIP: tl.constexpr,
    TERMS: tl.constexpr,
    BY: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Toeplitz matrices of every row of every filter, with BY - 1 zero ones above and below."""
    rows = kernel_h + 2 * BY - 2
    channel = (tl.program_id(0) // rows).to(tl.int64)
    row = tl.program_id(0) % rows
    chunk = tl.program_id(1)
    i, j = tl.arange(0, BK)[:, None], tl.arange(0, BN)[None, :]
    ky = row - (BY - 1)
    kx = (chunk_low + chunk) * BK + i - j + left
    inside = (ky >= 0) & (ky < kernel_h) & (kx >= 0) & (kx < kernel_w)
    if FLIP:
        ky, kx = kernel_h - 1 - ky, kernel_w - 1 - kx
    value = tl.load(weight + (channel * kernel_h + ky) * kernel_w + kx, inside, other=0.0)
    target = table + ((channel * rows + row) * chunks + chunk) * (BK * BN) + i * BN + j
    if TERMS == 2:
        value = value * scale_of(tl.load(largest + channel))
        high = value.to(tl.float16)
        tl.store(target, high)
        low = (value - high.to(tl.float32)).to(tl.float16)
        tl.store(target + channels.to(tl.int64) * rows * chunks * (BK * BN), low)
    else:
        tl.store(target, value)


@triton.jit
def correlate(
    input,  # (TERMS, batch, channels, height, width), rows at multiples of eight elements
    table,  # of ``filter_matrices`` for ``channels`` channels
    bias,  # (channels,), read with BIAS
    output,  # (batch, channels, output_h, output_w)
    input_largest,  # (batch, channels), read with TERMS == 2
    weight_largest,  # (channels,), read with TERMS == 2
    batch,
    channels,
    height,
    width8,
    output_h,
    output_w,
    input_image8,
    input_channel8,
    input_row8,
    input_term8,
    output_image,
    output_channel,
    largest_image,
    kernel_h,
    top,
    chunk_low,
    chunk_high,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    TERMS: tl.constexpr,
    BM: tl.constexpr,
    BY: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Output of a tile: BM (block of rows, image) times BY rows times BN columns of a channel."""
    width = width8 * 8
    tiles_x = tl.cdiv(output_w, BN)
    items = batch * tl.cdiv(output_h, BY)
    tiles = tiles_x * tl.cdiv(items, BM)
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    tile_x = tl.program_id(0) % tiles_x
    first = tl.program_id(0) % tiles // tiles_x * BM
    item = first + tl.arange(0, BM)
    image = (item % batch).to(tl.int64)
    y = item // batch * BY
    # Rows of the input that meet no tile of this program, and columns off the map, are left out.
    step_low = tl.maximum(0, top - (tl.minimum(first + BM, items) - 1) // batch * BY)
    step_high = tl.minimum(kernel_h + BY - 1, height + top - first // batch * BY)
    tile_chunk = tile_x * (BN // BK)
    low = tl.maximum(chunk_low, -tile_chunk)
    span = tl.minimum(chunk_high, tl.cdiv(width, BK) - tile_chunk) - low
    steps = tl.maximum(step_high - step_low, 0) * tl.maximum(span, 0)
    span = tl.maximum(span, 1)

    k = tl.arange(0, BK)
    column = tl.arange(0, BY * BN)
    dy, j = column // BN, column % BN
    rows = kernel_h + 2 * BY - 2
    chunks = chunk_high - chunk_low
    plane = input + (image * (input_image8 * 8) + channel * (input_channel8 * 8))[:, None] + k
    matrices = (
        table
        + (channel * rows + BY - 1) * chunks * (BK * BN)
        + (k[:, None] * BN + (j - dy * (chunks * (BK * BN)))[None, :])
    )
    input_term = input_term8.to(tl.int64) * 8
    table_term = channels.to(tl.int64) * rows * chunks * (BK * BN)
    total = tl.zeros((BM, BY * BN), tl.float32)
    if TERMS == 2:
        weight_unscale = unscale_of(tl.load(weight_largest + channel))
    for t in range(steps):
        step, chunk = step_low + t // span, low + t % span
        row = y + step - top
        x = tile_x * BN + chunk * BK
        inside = ((item < items) & (row >= 0) & (row < height))[:, None] & (x + k < width)[None, :]
        a = plane + row[:, None] * (input_row8 * 8) + x
        b = matrices + (step * chunks + chunk - chunk_low) * (BK * BN)
        if TERMS == 2:
            a_high, b_high = tl.load(a, inside, other=0.0), tl.load(b)
            a_low, b_low = tl.load(a + input_term, inside, other=0.0), tl.load(b + table_term)
            part = tl.dot(a_low, b_high)
            part = tl.dot(a_high, b_low, part)
            part = tl.dot(a_high, b_high, part)
            total += part * weight_unscale
        else:
            total = tl.dot(tl.load(a, inside, other=0.0), tl.load(b), total)

    if TERMS == 2:
        largest = input_largest + image * largest_image + channel
        total *= unscale_of(tl.load(largest, item < items, other=1.0))[:, None]
    if BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    output_y, output_x = y[:, None] + dy[None, :], tile_x * BN + j
    inside = (item < items)[:, None] & (output_y < output_h) & (output_x < output_w)[None, :]
    place = (image * output_image + channel * output_channel)[:, None] + output_y * output_w
    tl.store(output + place + output_x[None, :], total.to(output.dtype.element_ty), inside)


@triton.jit
def row_products(
    input,  # (TERMS, batch, channels, height, width), rows at multiples of eight elements
    grad,  # (TERMS, batch, channels, output_h, output_w), likewise
    products,  # (channels, splits, blocks * BU, BN, BW)
    input_largest,  # (channels,), read with TERMS == 2
    grad_largest,  # (channels,), read with TERMS == 2
    batch,
    height,
    width8,
    output_h,
    output_w8,
    input_image8,
    input_channel8,
    input_row8,
    input_term8,
    grad_image8,
    grad_channel8,
    grad_row8,
    grad_term8,
    blocks,
    splits,
    top,
    window8,
    TERMS: tl.constexpr,
    BU: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BR: tl.constexpr,
):
    """Products of columns of the gradient with columns of the input, for BU rows of a filter.

    ``products[c, s, ky, j, i]`` is the sum over images and rows ``y`` of share ``s``, and over
    tiles of columns from ``x``, of ``grad[y, x + j] * input[y + ky - top, x + window + i]``.
    """
    program = tl.program_id(0)
    block, split = program % blocks, program // blocks % splits
    channel = (program // (blocks * splits)).to(tl.int64)
    width, output_w = width8 * 8, output_w8 * 8
    first = block * BU
    # Rows of outputs of which some row of the input lies on the map.
    y_low = tl.maximum(0, top - (first + BU - 1))
    y_high = tl.maximum(tl.minimum(output_h, height + top - first), y_low)
    row_steps = tl.cdiv((y_high - y_low) * batch, BR)
    share = tl.cdiv(row_steps, splits)
    begin = split * share
    tiles_x = tl.cdiv(output_w, BN)
    steps = tl.maximum(tl.minimum(share, row_steps - begin), 0) * tiles_x

    q, j, r = tl.arange(0, BU * BW), tl.arange(0, BN), tl.arange(0, BR)
    du, i = q // BW, q % BW
    input_plane = input + channel * (input_channel8 * 8)
    grad_plane = grad + channel * (grad_channel8 * 8)
    input_term, grad_term = input_term8.to(tl.int64) * 8, grad_term8.to(tl.int64) * 8
    total = tl.zeros((BU * BW, BN), tl.float32)
    if TERMS == 2:
        unscale = unscale_of(tl.load(grad_largest + channel))
    for t in range(steps):
        item = (begin + t // tiles_x) * BR + r
        x = t % tiles_x * BN
        y = y_low + item // batch
        image = (item % batch).to(tl.int64)
        inside = (y < y_high)[:, None] & (x + j < output_w)[None, :]
        b = grad_plane + (image * (grad_image8 * 8) + y * (grad_row8 * 8))[:, None] + (x + j)
        row = y[:, None] + (first + du - top)[None, :]
        column = x + window8 * 8 + i
        on_map = (row >= 0) & (row < height) & ((column >= 0) & (column < width))[None, :]
        on_map = on_map & (y < y_high)[:, None]
        a = input_plane + (image * (input_image8 * 8))[:, None] + row * (input_row8 * 8) + column
        if TERMS == 2:
            a_high = tl.trans(tl.load(a, on_map, other=0.0))
            a_low = tl.trans(tl.load(a + input_term, on_map, other=0.0))
            b_high = tl.load(b, inside, other=0.0)
            b_low = tl.load(b + grad_term, inside, other=0.0)
            part = tl.dot(a_low, b_high)
            part = tl.dot(a_high, b_low, part)
            part = tl.dot(a_high, b_high, part)
            total += part * unscale
        else:
            a_high = tl.trans(tl.load(a, on_map, other=0.0))
            total = tl.dot(a_high, tl.load(b, inside, other=0.0), total)

    if TERMS == 2:
        total *= unscale_of(tl.load(input_largest + channel))
    place = ((channel * splits + split) * blocks + block) * (BU * BW * BN)
    target = products + place + (du * (BN * BW) + i)[:, None] + (j * BW)[None, :]
    tl.store(target, total)


@triton.jit
def sum_diagonals(
    products,  # of ``row_products``
    output,  # (channels, kernel_h, kernel_w), contiguous
    kernel_h,
    kernel_w,
    rows,  # blocks * BU
    splits,
    diagonal,  # column of the products that meets column 0 of the gradient at tap 0
    KX: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Sums along the diagonals of the products: the gradient of the filters."""
    channel = (tl.program_id(0) // kernel_h).to(tl.int64)
    ky = tl.program_id(0) % kernel_h
    kx, j = tl.arange(0, KX)[None, :], tl.arange(0, BN)[:, None]
    i = kx + j + diagonal
    inside = (i >= 0) & (i < BW) & (kx < kernel_w)
    total = tl.zeros((BN, KX), tl.float32)
    for split in range(splits):
        place = ((channel * splits + split) * rows + ky) * (BN * BW)
        total += tl.load(products + place + j * BW + i, inside, other=0.0)
    column = tl.arange(0, KX)
    target = output + (channel * kernel_h + ky) * kernel_w + column
    tl.store(target, tl.sum(total, 0).to(output.dtype.element_ty), column < kernel_w)

"""GPU kernels of algorithm "triton": depthwise convolution as products with Toeplitz matrices.

A row of outputs is the sum over the kernel's rows ``ky`` of a row of the input times a matrix
``T[i, j] = w[ky, i - j + left]``. One product serves ``BY`` rows of outputs at once: its columns
are (row of outputs, column of outputs), and its steps go over the rows of the input that these
read. The rows of the product are the images of the batch and, when those are few, blocks of rows.

Tensor cores multiply 16-bit numbers and add in float32, cutting off what does not fit. A float32
number is split into two float16 (22 bits) after scaling by a power of two, and each product is
three of theirs; short chains of them are added to the sum with proper rounding.

Integers whose name ends in 8 count groups of eight elements: the compiler then knows that rows
start at 16-byte boundaries. Several launches share the channels out when the matrices of all would
take too much memory: each computes ``channels`` of ``all_channels``, from ``first_channel``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes of a convolution: not worth a kernel of their own for each value.
SIZES = (
    "first_channel", "channels", "all_channels", "batch", "splits", "height", "width_units",
    "width8", "output_h", "output_w8", "output_w_units", "kernel_h", "kernel_w",
    "top", "left", "chunk_low", "chunk_high", "window8", "rows", "diagonal",
)  # fmt: skip


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


@triton.jit(do_not_specialize=SIZES)
def pack_planes(
    input,  # (batch, channels, height, width), contiguous
    output,  # (1 or 2 terms, batch, channels, height, width to a multiple of 8)
    largest,  # (batch, channels), written with SCALE == 1; (channels,), read with SCALE == 2
    batch,
    channels,
    height,
    width_units,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Pad rows with zeros to a multiple of eight columns, and split float32 into two float16.

    SCALE is 0 for 16-bit numbers, which stay one, 1 for a scale of each plane, and 2 for a scale
    of each channel. Rows are multiples of UNIT elements long.
    """
    width = width_units * UNIT
    pitch = tl.cdiv(width, 8) * 8
    size, padded_size = height * width, height * pitch
    planes = tl.cast(batch, tl.int64) * channels
    plane = tl.program_id(0).to(tl.int64) * PLANES + tl.arange(0, PLANES)
    known = (plane < planes)[:, None]
    source = input + plane[:, None] * size
    target = output + plane[:, None] * padded_size
    pixel = tl.arange(0, PIXELS)[None, :]
    if SCALE == 1:
        peak = tl.zeros((PLANES,), tl.float32)
        for begin in range(0, size, PIXELS):
            place = begin + pixel
            value = tl.load(source + place, known & (place < size), other=0.0)
            peak = tl.maximum(peak, tl.max(tl.abs(value), 1))
        tl.store(largest + plane, peak, plane < planes)
        scale = scale_of(peak)[:, None]
    if SCALE == 2:
        scale = scale_of(tl.load(largest + plane % channels))[:, None]
    for begin in range(0, padded_size, PIXELS):
        place = begin + pixel
        inside = known & (place < padded_size)
        if UNIT == 8:
            value = tl.load(source + place, inside, other=0.0)
        else:
            x = place % pitch
            value = tl.load(source + place // pitch * width + x, inside & (x < width), other=0.0)
        if SCALE == 0:
            tl.store(target + place, value, inside)
        else:
            value = value * scale
            high = value.to(tl.float16)
            tl.store(target + place, high, inside)
            low = (value - high.to(tl.float32)).to(tl.float16)
            tl.store(target + planes * padded_size + place, low, inside)


@triton.jit(do_not_specialize=SIZES)
def filter_matrices(
    weight,  # (all_channels, kernel_h, kernel_w), contiguous
    table,  # (TERMS, channels, kernel_h + 2 * BY - 2, chunks, BK, BN)
    largest,  # (all_channels,), written with TERMS == 2
    first_channel,
    channels,
    kernel_h,
    kernel_w,
    left,
    chunk_low,
    chunk_high,
    FLIP: tl.constexpr,
    TERMS: tl.constexpr,
    BY: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Toeplitz matrices of every row of every filter, with BY - 1 zero ones above and below.

    The filters are those of ``channels`` channels from ``first_channel``.
    """
    rows, chunks = kernel_h + 2 * BY - 2, chunk_high - chunk_low
    size = rows * chunks * (BK * BN)
    local = tl.program_id(0).to(tl.int64)
    taps = weight + (first_channel + local) * (kernel_h * kernel_w)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    ky = entry // (chunks * (BK * BN)) - (BY - 1)
    i, j = entry // BN % (chunks * BK), entry % BN
    kx = chunk_low * BK + i - j + left
    inside = (ky >= 0) & (ky < kernel_h) & (kx >= 0) & (kx < kernel_w)
    if FLIP:
        ky, kx = kernel_h - 1 - ky, kernel_w - 1 - kx
    value = tl.load(taps + ky * kernel_w + kx, inside, other=0.0)
    target = table + local * size + entry
    if TERMS == 2:
        peaks = tl.zeros((1024,), tl.float32)
        for begin in range(0, kernel_h * kernel_w, 1024):
            tap = begin + tl.arange(0, 1024)
            some = tl.load(taps + tap, tap < kernel_h * kernel_w, other=0.0)
            peaks = tl.maximum(peaks, tl.abs(some))
        peak = tl.max(peaks, 0)
        tl.store(largest + first_channel + local, peak, tl.program_id(1) == 0)
        value = value * scale_of(peak)
        high = value.to(tl.float16)
        tl.store(target, high, entry < size)
        low = (value - high.to(tl.float32)).to(tl.float16)
        tl.store(target + tl.cast(channels, tl.int64) * size, low, entry < size)
    else:
        tl.store(target, value, entry < size)


@triton.jit(do_not_specialize=SIZES)
def correlate(
    input,  # (TERMS, batch, all_channels, height, width)
    table,  # of ``filter_matrices`` for ``channels`` channels
    bias,  # (all_channels,), read with BIAS
    output,  # (batch, all_channels, output_h, output_w)
    input_largest,  # (batch, all_channels), read with TERMS == 2
    weight_largest,  # (all_channels,), read with TERMS == 2
    first_channel,
    channels,
    all_channels,
    batch,
    height,
    width8,
    output_h,
    output_w_units,
    kernel_h,
    top,
    chunk_low,
    chunk_high,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    UNIT: tl.constexpr,
    TERMS: tl.constexpr,
    BM: tl.constexpr,
    BY: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Output of a tile: BM (block of rows, image) times BY rows times BN columns of a channel."""
    width, output_w = width8 * 8, output_w_units * UNIT
    tiles_x = tl.cdiv(output_w, BN)
    items = batch * tl.cdiv(output_h, BY)
    tiles = tiles_x * tl.cdiv(items, BM)
    local = (tl.program_id(0) // tiles).to(tl.int64)
    channel = first_channel + local
    tile_x = tl.program_id(0) % tiles_x
    first = tl.program_id(0) % tiles // tiles_x * BM
    item = first + tl.arange(0, BM)
    plane = (item % batch).to(tl.int64) * all_channels + channel
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
    pixels = input + plane[:, None] * (height * width) + k
    matrices = (
        table
        + (local * rows + BY - 1) * chunks * (BK * BN)
        + (k[:, None] * BN + (j - dy * (chunks * (BK * BN)))[None, :])
    )
    input_term = tl.cast(batch, tl.int64) * all_channels * (height * width)
    table_term = tl.cast(channels, tl.int64) * rows * chunks * (BK * BN)
    total = tl.zeros((BM, BY * BN), tl.float32)
    if TERMS == 2:
        weight_unscale = unscale_of(tl.load(weight_largest + channel))
    for t in range(steps):
        step, chunk = step_low + t // span, low + t % span
        row = y + step - top
        x = tile_x * BN + chunk * BK
        inside = ((item < items) & (row >= 0) & (row < height))[:, None] & (x + k < width)[None, :]
        a = pixels + row[:, None] * width + x
        b = matrices + (step * chunks + chunk - chunk_low) * (BK * BN)
        if TERMS == 2:
            a_high, b_high = tl.load(a, inside, other=0.0), tl.load(b)
            a_low, b_low = tl.load(a + input_term, inside, other=0.0), tl.load(b + table_term)
            part = tl.dot(a_low, b_high)
            part = tl.dot(a_high, b_low, part)
            part = tl.dot(a_high, b_high, part)
            total += part * weight_unscale  # outside the tensor cores, so that the sum is rounded
        else:
            total = tl.dot(tl.load(a, inside, other=0.0), tl.load(b), total)

    if TERMS == 2:
        total *= unscale_of(tl.load(input_largest + plane, item < items, other=1.0))[:, None]
    if BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    output_y, output_x = y[:, None] + dy[None, :], tile_x * BN + j
    inside = (item < items)[:, None] & (output_y < output_h) & (output_x < output_w)[None, :]
    target = output + plane[:, None] * (output_h * output_w)
    offset = output_y * output_w + output_x[None, :]
    tl.store(target + offset, total.to(output.dtype.element_ty), inside)


@triton.jit(do_not_specialize=SIZES)
def row_products(
    input,  # (TERMS, batch, all_channels, height, width)
    grad,  # (TERMS, batch, all_channels, output_h, output_w)
    products,  # (channels, splits, blocks * BU, BN, BW), blocks of BU rows of the filter
    input_largest,  # (all_channels,), read with TERMS == 2
    grad_largest,  # (all_channels,), read with TERMS == 2
    first_channel,
    all_channels,
    batch,
    height,
    width8,
    output_h,
    output_w8,
    kernel_h,
    splits,
    top,
    window8,
    TERMS: tl.constexpr,
    BU: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
):
    """Products of columns of the gradient with columns of the input, for BU rows of a filter.

    ``products[c, s, ky, j, i]`` is the sum over images, rows ``y`` and tiles of columns from
    ``x``, the share ``s`` of them, of ``grad[y, x + j] * input[y + ky - top, x + window + i]``.
    A step adds up BI images of BR / BI rows.
    """
    program, blocks = tl.program_id(0), tl.cdiv(kernel_h, BU)
    block, split = program % blocks, program // blocks % splits
    local = (program // (blocks * splits)).to(tl.int64)
    channel = first_channel + local
    width, output_w = width8 * 8, output_w8 * 8
    first = block * BU
    # Rows of outputs of which some row of the input lies on the map.
    y_low = tl.maximum(0, top - (first + BU - 1))
    y_high = tl.maximum(tl.minimum(output_h, height + top - first), y_low)
    tiles_x, tiles_image = tl.cdiv(output_w, BN), tl.cdiv(batch, BI)
    steps = tl.cdiv(y_high - y_low, BR // BI) * tiles_image * tiles_x
    share = tl.cdiv(steps, splits)
    begin = split * share

    q, j, r = tl.arange(0, BU * BW), tl.arange(0, BN), tl.arange(0, BR)
    du, i = q // BW, q % BW
    up = first + du - top
    planes = tl.cast(batch, tl.int64) * all_channels
    input_term, grad_term = planes * (height * width), planes * (output_h * output_w)
    total = tl.zeros((BU * BW, BN), tl.float32)
    if TERMS == 2:
        unscale = unscale_of(tl.load(grad_largest + channel))
    for t in range(begin, tl.minimum(begin + share, steps)):
        x = t % tiles_x * BN
        image = t // tiles_x % tiles_image * BI + r % BI
        y = y_low + t // (tiles_x * tiles_image) * (BR // BI) + r // BI
        use = (image < batch) & (y < y_high)
        plane = image.to(tl.int64) * all_channels + channel
        column = x + window8 * 8
        a = input + (plane * (height * width) + y * width + column)[:, None]
        a += (up * width + i)[None, :]
        b = grad + (plane * (output_h * output_w) + y * output_w + x)[:, None] + j[None, :]
        row = tl.where(use, y, -1 << 30)[:, None] + up[None, :]
        on_row = (column + i >= 0) & (column + i < width)
        on_map = (row >= 0) & (row < tl.where(on_row, height, 0)[None, :])
        inside = use[:, None] & (x + j < output_w)[None, :]
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
    place = ((local * splits + split) * blocks + block) * (BU * BW * BN)
    target = products + place + (du * (BN * BW) + i)[:, None] + (j * BW)[None, :]
    tl.store(target, total)


@triton.jit(do_not_specialize=SIZES)
def sum_diagonals(
    products,  # of ``row_products``
    output,  # (all_channels, kernel_h, kernel_w), contiguous
    first_channel,
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
    local = (tl.program_id(0) // kernel_h).to(tl.int64)
    ky = tl.program_id(0) % kernel_h
    kx, j = tl.arange(0, KX)[None, :], tl.arange(0, BN)[:, None]
    i = kx + j + diagonal
    inside = (i >= 0) & (i < BW) & (kx < kernel_w)
    total = tl.zeros((BN, KX), tl.float32)
    for split in range(splits):
        place = ((local * splits + split) * rows + ky) * (BN * BW)
        total += tl.load(products + place + j * BW + i, inside, other=0.0)
    column = tl.arange(0, KX)
    target = output + ((first_channel + local) * kernel_h + ky) * kernel_w + column
    tl.store(target, tl.sum(total, 0).to(output.dtype.element_ty), column < kernel_w)

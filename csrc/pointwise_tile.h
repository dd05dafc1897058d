// Pointwise (1x1) convolution: rows of pixels times a packed weight. One tile of it, whose sums stay in registers.
//
// A tile is kTileRows pixels by kTileColumns channels. Its pixels are broadcast from their own rows; up to kDepth input
// channels at a time, whose weights stay in the first level cache for the tiles below.
#pragma once

#include <omp.h>

#include "activation.h"
#include "kernels.h"

namespace RK_ISA {
namespace pointwise {

constexpr int64_t kPanel = RK_PANEL;
constexpr int64_t kTileColumns = RK_LANES == 16 ? 32 : 16;
constexpr int kVectors = kTileColumns / kLanes;
#if RK_LANES == 16 || defined(__aarch64__)  // 32 vector registers
constexpr int kTileRows = 28 / kVectors;
#else
constexpr int kTileRows = 12 / kVectors;
#endif
constexpr int64_t kDepth = 16 * 1024 / 4 / kTileColumns;  // channels whose weights for a tile are 16 KiB
constexpr int64_t kCachedFloats = 1024 * 1024 / 4;  // rows that a thread walks through for every group: 1 MiB
constexpr int64_t kStep = 4;

struct Product {
    const float* input;
    bool from_memory;  // rather than from the caches
    const float* packed;
    const float* bias;
    const float* residual;  // or null; its rows are as far apart as the output's
    float* output;
    int64_t input_stride, output_stride;
    int64_t depth, columns;
    int64_t weight_depth;  // of the packed weight, of which the product may be a part
    int activation;
    const float* input_sizes;   // powers of two by which the weights of an input channel have been divided, or null
    const float* output_sizes;  // and those of an output channel, or null
    const float* pair_sums;     // of the weights, as channel_pairs.h has them, or null
};

// The product of the rows from `row` on.
static RK_INLINE Product from_row(Product p, int64_t row) {
    if (p.input) p.input += row * p.input_stride;
    if (p.output) p.output += row * p.output_stride;
    if (p.residual) p.residual += row * p.output_stride;
    return p;
}

struct Span {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

static RK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static RK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static RK_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static RK_INLINE Span part(int64_t size, int64_t parts, int64_t i) {
    return {size * i / parts, size * (i + 1) / parts};
}

// Blocks of the input channels, of at most kDepth.
static RK_INLINE int64_t depth_blocks(int64_t depth) { return ceil_div(depth, kDepth); }
static RK_INLINE Span depth_block(int64_t depth, int64_t block) { return part(depth, depth_blocks(depth), block); }

// A stride of rows that spreads them over the cache: an odd number of its lines.
static RK_INLINE int64_t padded(int64_t depth) { return (ceil_div(depth, kLine) | 1) * kLine; }

// The product that reads hidden channels from the workspace.
static RK_INLINE Product from_workspace(Product second) {
    second.input_stride = padded(second.depth);
    return second;
}

// Rows of pixels where they are read.
struct Pixels {
    const float* data;
    int64_t stride;
};

// Weights of kTileColumns output channels, in panels of (input channels, kPanel) that lie `apart`.
struct Weights {
    const float* data;
    int64_t apart;
};

// From input channel `k` and output channel `column` on; a multiple of kTileColumns.
static RK_INLINE Weights weights_at(const Product& p, int64_t k, int64_t column) {
    return {p.packed + column * p.weight_depth + k * kPanel, p.weight_depth * kPanel};
}

// Rows of kTileColumns floats, `stride` apart.
struct Start {
    const float* rows;
    int64_t stride;
};

// sum[kRows][kVectors] += one input channel of the rows times its weights
template <int kRows>
static RK_INLINE void add_channel(Vec (*sum)[kVectors], const float* pixels, int64_t stride, const float* weights,
                                  int64_t apart) {
    Vec weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) weight[v] = load(weights + v * kLanes % kPanel + v * kLanes / kPanel * apart);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) {
        const Vec x = broadcast(pixels[row * stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sum[row][v] += x * weight[v];
    }
}

// block[kRows][kTileColumns] = start + pixels @ weights, over `depth` input channels. Meanwhile kFetch brings `next`, the
// rows of the next tile, into the first level cache.
template <int kRows, bool kFetch>
static void multiply(Pixels pixels, Weights weights, int64_t depth, Start start, float* block, const float* next) {
    constexpr int kNextLines = (kTileRows * kStep + kLine - 1) / kLine;
    const float *x = pixels.data, *w = weights.data;
    const int64_t stride = pixels.stride, apart = weights.apart;
    Vec sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sum[row][v] = load(start.rows + row * start.stride + v * kLanes);
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep) {
        if constexpr (kFetch)
            for (int line = 0; line < kNextLines; line++, next += kLine) __builtin_prefetch(next);
#pragma GCC unroll 4
        for (int64_t i = k; i < k + kStep; i++) add_channel<kRows>(sum, x + i, stride, w + i * kPanel, apart);
    }
    for (; k < depth; k++) add_channel<kRows>(sum, x + k, stride, w + k * kPanel, apart);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) store(block + row * kTileColumns + v * kLanes, sum[row][v]);
}

template <int kRows = kTileRows>
static RK_INLINE void multiply_rows(int64_t rows, Pixels pixels, Weights weights, int64_t depth, Start start, float* block,
                                    const float* next = nullptr) {
    if (rows == kRows)
        (next ? multiply<kRows, true> : multiply<kRows, false>)(pixels, weights, depth, start, block, next);
    else if constexpr (kRows > 1)
        multiply_rows<kRows - 1>(rows, pixels, weights, depth, start, block, next);
}

static RK_INLINE Vec activated(int activation, Vec v) {
    if (activation == RK_RELU) return max_with_zero(v);
    if (activation == RK_GELU) return gelu(v);
    return v;
}

// Brings what a tile will write, and the residual, into the first level cache.
static RK_INLINE void fetch_output(const Product& p, Span rows, int64_t column) {
    for (int64_t r = rows.begin; r < rows.end; r++)
        for (int64_t c = column; c < column + kTileColumns; c += kLine) {
            __builtin_prefetch(p.output + r * p.output_stride + c, 1);
            if (p.residual) __builtin_prefetch(p.residual + r * p.output_stride + c);
        }
}

// Brings one of `shares` of `lines` cache lines into the second level cache.
static RK_INLINE void fetch_share(const float* data, int64_t lines, int64_t share, int64_t shares) {
    const Span some = part(lines, shares, share);
    for (int64_t line = some.begin; line < some.end; line++) __builtin_prefetch(data + line * kLine, 0, 2);
}

}  // namespace pointwise
}  // namespace RK_ISA

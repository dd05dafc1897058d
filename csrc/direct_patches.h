// Small filters where channels are adjacent: patches of a few rows and columns of outputs.
//
// The sums of a patch are in registers, so that an input is loaded once for all its rows and columns. Patches go along the
// rows of a map with all groups of channels, in the order of memory. Each output is one sum of at most 49 products, or two.
#pragma once

#include "direct_kernels.h"

namespace RK_ISA {

// As many sums as hide the latency of an addition.
constexpr int patch_rows(int taps) { return taps == 3 ? 2 : 3; }
constexpr int patch_cols(int taps, int stride) { return taps == 3 || stride == 2 ? 4 : 3; }
constexpr int kMaxPatchCols = 4;
constexpr int kMostTaps = 7;  // of a row and a column for one sum; one of 81 products loses over 5e-7 of the largest

// Maps whose channels are adjacent, from pixel (0, 0) on; the filters of all groups one behind the other, and a bias of each
// channel or NULL.
struct Pixels {
    const float* x;
    int64_t x_pitch, x_step;
    int x_rows, x_cols;
    const float* w;
    int pad_top, pad_left;
    float* y;
    int64_t y_pitch, y_step;
    const float* bias;
    bool relu;
    int64_t channels;  // at least kLanes
    bool fetch;        // what the next patch meets
};

// Groups and rows of outputs, from the first to before the last.
struct Share {
    int64_t first_group, last_group;
    int first_row, last_row;
};

// The last group of channels overlaps the one before it where their number is no multiple of kLanes.
static RK_INLINE int64_t first_channel(int64_t channels, int64_t group) {
    const int64_t first = group * kLanes;
    return first < channels - kLanes ? first : channels - kLanes;
}

// Brings what follows in memory into the second level cache.
template <int Floats, int Rows>
static RK_INLINE void fetch_rows(const float* row, int64_t pitch) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++, row += pitch)
#pragma GCC unroll 8
        for (int i = 0; i < Floats; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// GCC adds up one sum after the other rather than row by row, and spills inputs for them where registers are few.
template <int R, int T>
static RK_INLINE void finish_products([[maybe_unused]] Vec (&sum)[R][T]) {
#if defined(__x86_64__) && RK_LANES < 16
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) asm volatile("" : "+x"(sum[r][t]) : : "memory");
#endif
}

// Starts new sums.
template <int R, int T>
static RK_INLINE void set_aside(Vec (&sum)[R][T], Vec (&aside)[R][T]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            aside[r][t] = sum[r][t];
            sum[r][t] = Vec{};
        }
}

// `count` patches side by side of R rows and T columns of outputs, from (row, col) on, for a forward pass of stride S. Edge:
// some of the pixels that they meet do not exist.
template <bool Edge, int K, int S, int R, int T>
static void correlate_patches(const Pixels& given, const Share& share, int row, int col, int count) {
    constexpr int kRows = (R - 1) * S + K, kCols = (T - 1) * S + K;
    const Pixels p = given;  // a store might change what is given
    const int top = row * S - p.pad_top;
    const int64_t first_group = share.first_group, last_group = share.last_group;
    for (int patch = 0; patch < count; patch++, col += T) {
        const int left = col * S - p.pad_left;
        const float *x = p.x + top * p.x_pitch + left * p.x_step, *w = p.w + first_group * K * K * kLanes;
        float* y = p.y + row * p.y_pitch + col * p.y_step;
        const float* next_x = x + (kRows - R * S) * p.x_pitch + kCols * p.x_step;
        const float* next_y = y + T * p.y_step;
        for (int64_t group = first_group; group < last_group; group++, w += K * K * kLanes) {
            if (p.fetch) {
                fetch_rows<T * S * kLanes, R * S>(next_x, p.x_pitch);
                fetch_rows<T * kLanes, R>(next_y, p.y_pitch);
                next_x += T * S * kLanes;
                next_y += T * kLanes;
            }
            const int64_t first = first_channel(p.channels, group);
            const float* line = x + first;
            Vec sum[R][T] = {}, upper[R][T] = {};
#pragma GCC unroll 16
            for (int i = 0; i < kRows; i++, line += p.x_pitch) {
                if (K > kMostTaps && i == kRows / 2) set_aside(sum, upper);
                if (Edge && (top + i < 0 || top + i >= p.x_rows)) continue;
#pragma GCC unroll 16
                for (int j = 0; j < kCols; j++) {
                    if (Edge && (left + j < 0 || left + j >= p.x_cols)) continue;
                    const Vec v = load(line + j * p.x_step);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
                        for (int l = 0; l < K; l++) {
                            const int k = i - r * S, t = (j - l) / S;
                            if (k >= 0 && k < K && j >= l && (j - l) % S == 0 && t < T)
                                sum[r][t] += load(w + (k * K + l) * kLanes) * v;
                        }
                }
                if constexpr (K > 3 || kLanes == 4) finish_products(sum);
            }
            const Vec start = p.bias ? load(p.bias + first) : Vec{};
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    if (K > kMostTaps) sum[r][t] += upper[r][t];
                    store(y + first + r * p.y_pitch + t * p.y_step, finish(sum[r][t], start, p.relu));
                }
        }
    }
}

typedef void (*PatchKernel)(const Pixels&, const Share&, int row, int col, int count);

template <bool Edge, int K, int S, int R, int T>
static constexpr PatchKernel patch_kernel() {
    if constexpr (T <= patch_cols(K, S))
        return correlate_patches<Edge, K, S, R, T>;
    else
        return nullptr;
}

template <int K, int S, class Widths = Indices<1, 2, 3, 4>>
struct PatchKernels;

template <int K, int S, int... T>
struct PatchKernels<K, S, Indices<T...>> {
    static constexpr PatchKernel one_row[2][kMaxPatchCols] = {{patch_kernel<false, K, S, 1, T>()...},
                                                              {patch_kernel<true, K, S, 1, T>()...}};
    static constexpr PatchKernel all_rows[2][kMaxPatchCols] = {{patch_kernel<false, K, S, patch_rows(K), T>()...},
                                                               {patch_kernel<true, K, S, patch_rows(K), T>()...}};
};

// `cols` columns of outputs for square filters whose taps lie side by side.
template <int K, int S>
static void correlate_pixels(const Pixels& p, const Share& share, int cols) {
    constexpr int kMost = patch_cols(K, S);
    const int left_cols = smaller((p.pad_left + S - 1) / S, cols);  // whose taps leave x, as those from `inner_cols` on do
    const int inner_cols = smaller((p.x_cols + p.pad_left - K + S) / S, cols);
    for (int row = share.first_row, rows; row < share.last_row; row += rows) {
        rows = share.last_row - row >= patch_rows(K) ? patch_rows(K) : 1;
        const auto& kernels = rows == 1 ? PatchKernels<K, S>::one_row : PatchKernels<K, S>::all_rows;
        const int top = row * S - p.pad_top;
        const bool border = top < 0 || top + (rows - 1) * S + K > p.x_rows;
        for (int col = 0, width, count; col < cols; col += count * width) {
            width = smaller(kMost, cols - col);
            const bool edge = border || col < left_cols || col + width > inner_cols;
            count = edge ? 1 : (inner_cols - col) / width;
            kernels[edge][width - 1](p, share, row, col, count);
        }
    }
}

}  // namespace RK_ISA

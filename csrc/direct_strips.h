// Small filters on a group of channels: strips of a few columns.
//
// A strip of T columns runs down the map. The sums of all rows of outputs that an input row reaches are in registers, so
// that each input is loaded once. Each output is one sum.
#pragma once

#include "direct_kernels.h"

namespace RK_ISA {

constexpr int rows_reached(int taps, int stride) { return (taps + stride - 1) / stride; }

// Sums in registers, beside inputs and taps; with more GCC spills.
constexpr int kStripSums = kSums > 21 ? 21 : kSums;

// Most columns of a strip.
constexpr int kMaxStripColumns = 8;
constexpr int strip_columns(int taps, int stride) {
    const int fit = kStripSums / rows_reached(taps, stride);
    return fit < kMaxStripColumns ? fit : kMaxStripColumns;
}

constexpr int kRowsAhead = 6;  // from the row in use to the one that is fetched where images outgrow the caches

template <int Count>
static RK_INLINE void fetch_pixels(const float* pixel, int64_t step) {
#pragma GCC unroll 32
    for (int i = 0; i < Count; i++) __builtin_prefetch(pixel + i * step + kLine - 1, 0, 2);
}

// Adds row `row` of x, which is at `x` from column `left` on, to the sums of the rows of outputs that it reaches: the
// last of them by row `First` of the taps, each before it by the taps S rows further down. Edge: some columns do not
// exist.
template <bool Edge, int K, int S, int T, int First>
static RK_INLINE void add_pixels(const Correlation& c, const float* x, int row, int left,
                                 Vec (&sum)[rows_reached(K, S)][T]) {
    constexpr int kCount = (T - 1) * S + K, kRows = rows_reached(K, S);
    if (c.fetch) fetch_pixels<kCount>(x + kRowsAhead * c.x_pitch, c.x_step);
    if (row < 0 || row >= c.x_rows) return;
#pragma GCC unroll 32
    for (int j = 0; j < kCount; j++) {
        if (Edge && (left + j < 0 || left + j >= c.x_cols)) continue;
        const Vec v = load(x + j * c.x_step);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
            for (int l = 0; l < K; l++) {
                const int k = First + (kRows - 1 - i) * S, t = (j - l) / S;
                if (k < K && j >= l && (j - l) % S == 0 && t < T) sum[i][t] += load(c.w + (k * K + l) * kLanes) * v;
            }
    }
}

// T columns of outputs from `col`, a forward pass of stride S, in the rows from `begin` to before `end`.
template <bool Edge, int K, int S, int T>
static void correlate_strip(const Correlation& given, int col, int begin, int end) {
    const Correlation c = given;  // a store might change what is given
    constexpr int kRows = rows_reached(K, S);
    const int left = col * S - c.pad_left;
    const float* x = c.x + (begin * S - c.pad_top) * c.x_pitch + left * c.x_step;
    float* y = c.y + (begin - kRows + 1) * c.y_pitch + col * c.y_step;
    Vec sum[kRows][T] = {};
    for (int row = begin; row < end + kRows - 1; row++, x += S * c.x_pitch, y += c.y_pitch) {
        add_pixels<Edge, K, S, T, 0>(c, x, row * S - c.pad_top, left, sum);
        if constexpr (S == 2) add_pixels<Edge, K, S, T, 1>(c, x + c.x_pitch, row * S + 1 - c.pad_top, left, sum);
        if (row >= begin + kRows - 1) {
            if (c.fetch) fetch_pixels<T>(y + kRowsAhead * c.y_pitch, c.y_step);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) store(y + t * c.y_step, finish(sum[0][t], c.start, c.relu));
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) sum[i][t] = i < kRows - 1 ? sum[i + 1][t] : Vec{};
    }
}

typedef void (*StripKernel)(const Correlation&, int col, int begin, int end);

template <bool Edge, int K, int S, int T>
static constexpr StripKernel strip_kernel() {
    if constexpr (T <= strip_columns(K, S))
        return correlate_strip<Edge, K, S, T>;
    else
        return nullptr;
}

template <int K, int S, class Widths = Indices<1, 2, 3, 4, 5, 6, 7, 8>>
struct StripKernels;

template <int K, int S, int... T>
struct StripKernels<K, S, Indices<T...>> {
    static constexpr StripKernel table[2][kMaxStripColumns] = {{strip_kernel<false, K, S, T>()...},
                                                               {strip_kernel<true, K, S, T>()...}};
};

// `width` columns of outputs from `col`, in the rows from `begin` to before `end`, for square filters whose taps lie side
// by side.
template <int K, int S>
static RK_INLINE void correlate_columns(const Correlation& c, int col, int width, int begin, int end) {
    const int left = col * S - c.pad_left;
    const bool edge = left < 0 || left + (width - 1) * S + K > c.x_cols;
    StripKernels<K, S>::table[edge][width - 1](c, col, begin, end);
}

}  // namespace RK_ISA

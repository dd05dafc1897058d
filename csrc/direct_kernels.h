// Register-blocked loops of the direct algorithm on one group of channels.
//
// Both kernels add a few columns and rows of taps to a block of outputs, with all sums in registers:
//   add_taps   K taps and T sums in registers; each input of a row is loaded once for all of them.
//   add_block  R x T sums in registers; each tap is loaded once for all of them. For outputs of few columns, the
//              weight gradients of small filters, where T sums alone would not hide the latency of an addition.
// At the borders of the map only the outputs that an input reaches take part, so that padding is never multiplied.
#pragma once

#include "pack.h"

namespace RK_ISA {

static RK_INLINE int larger(int a, int b) { return a > b ? a : b; }
static RK_INLINE int smaller(int a, int b) { return a < b ? a : b; }

constexpr int kMaxTaps = 7;
constexpr int kMaxCols = 14;
constexpr int kMaxBlockCols = 6;
constexpr int kMaxBlockRows = 3;
#if RK_LANES == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kSums = kRegisters == 32 ? 28 : 14;

// Most columns at once for `taps` taps, and most rows for `cols` columns.
constexpr int cols_at_once(int taps) { return kSums > 14 ? kMaxCols : 15 - taps; }
constexpr int rows_at_once(int cols) { return kSums / cols < kMaxBlockRows ? kSums / cols : kMaxBlockRows; }

// y[i][j] = (add ? y[i][j] : start) + sum of w[k][l] * x[i + k - pad_top][j + l - pad_left] over the pixels of x
// that exist; then clamped at zero when `relu`.
struct Correlation {
    const float* x;
    int64_t x_pitch, x_step;
    int x_rows, x_cols;
    const float* w;
    int64_t w_pitch, w_step;
    int kernel_rows, kernel_cols, pad_top, pad_left;
    float* y;
    int64_t y_pitch, y_step;
    int y_rows, y_cols;
    Vec start;
    bool add, relu;
    bool split_taps;  // where to split long sums: between rows of taps, or of x
};

// Rows of taps from `begin` to `end` for the first row of outputs, `shift` less for each further row.
struct Part {
    int begin, end, shift;
};

// The taps of an output row that meet rows of x.
struct Range {
    int begin, end;
};

static RK_INLINE Range taps_of_row(const Correlation& c, const Part& part, int row) {
    const int begin = larger(larger(0, c.pad_top - row), part.begin - part.shift * row);
    const int end = smaller(smaller(c.kernel_rows, c.x_rows + c.pad_top - row), part.end - part.shift * row);
    return {begin, larger(begin, end)};
}

template <int R, int T>
static RK_INLINE void store_sums(const Correlation& c, float* y, Vec (&sum)[R][T]) {
    const int64_t pitch = c.y_pitch, step = c.y_step;
    const bool add = c.add, relu = c.relu;
    const Vec start = c.start;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            float* p = y + r * pitch + t * step;
            const Vec v = sum[r][t] + (add ? load(p) : start);
            store(p, relu ? max_with_zero(v) : v);
        }
}

// Adds the K taps of one row to T sums. Edge: some of the columns `x`, `x` + `step`, ... do not exist, but those from
// `first` to before `end`.
template <bool Edge, int K, int T>
static RK_INLINE void add_row(const float* x, int64_t step, const float* w, int64_t w_step, int first, int end,
                              Vec (&sum)[1][T]) {
    Vec tap[K];
#pragma GCC unroll 8
    for (int l = 0; l < K; l++) tap[l] = load(w + l * w_step);
#pragma GCC unroll 40
    for (int j = 0; j < T + K - 1; j++) {
        if (Edge && j < first) continue;
        if (Edge && j >= end) break;
        const Vec v = load(x + j * step);
#pragma GCC unroll 8
        for (int l = 0; l < K; l++)
            if (j - l >= 0 && j - l < T) sum[0][j - l] += tap[l] * v;
    }
}

// Adds the taps of K columns to a block of T columns of outputs from `col`, in all rows.
template <bool Edge, int K, int T, bool Packed>
static RK_INLINE void add_taps_to_block(const Correlation& c, const Part& part, int col) {
    const int64_t step = Packed ? kLanes : c.x_step;
    const int first = c.pad_left - col, end = c.x_cols + first;
    for (int row = 0; row < c.y_rows; row++) {
        const Range taps = taps_of_row(c, part, row);
        if (taps.begin == taps.end && c.add && !c.relu) continue;
        Vec sum[1][T] = {};
        const float* x = c.x + (row + taps.begin - c.pad_top) * c.x_pitch - first * step;
        const float* w = c.w + taps.begin * c.w_pitch;
        for (int k = taps.begin; k < taps.end; k++, x += c.x_pitch, w += c.w_pitch)
            add_row<Edge, K, T>(x, step, w, c.w_step, first, end, sum);
        store_sums(c, c.y + row * c.y_pitch + col * c.y_step, sum);
    }
}

template <int K, int T, bool Packed>
static void add_taps(const Correlation& given, const Part& given_part, int col, int blocks) {
    const Correlation c = given;  // a store might change what is given
    const Part part = given_part;
    for (int block = 0; block < blocks; block++, col += T) {
        const int first = c.pad_left - col, end = c.x_cols + first;
        if (first <= 0 && end >= T + K - 1)
            add_taps_to_block<false, K, T, Packed>(c, part, col);
        else if ((first < T + K - 1 && end > 0) || !c.add || c.relu)
            add_taps_to_block<true, K, T, Packed>(c, part, col);
    }
}

// One tap over the outputs Begin .. End, the first of which reads `x`.
template <int Begin, int End, int R, int T>
static RK_INLINE void add_tap(const float* w, const float* x, int64_t x_pitch, Vec (&sum)[R][T]) {
    const Vec tap = load(w);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int t = Begin; t < End; t++) sum[r][t] += tap * load(x + r * x_pitch + (t - Begin) * kLanes);
}

// Taps `from` .. `to` before the one that reaches every output; the D-th before misses the first D.
template <int D, int R, int T>
static RK_INLINE void add_left(const Correlation& c, int from, int to, const float* w, const float* x,
                               Vec (&sum)[R][T]) {
    if constexpr (D < T) {
        if (D > to) return;
        if (D >= from) add_tap<D, T>(w - D * c.w_step, x, c.x_pitch, sum);
        add_left<D + 1>(c, from, to, w, x, sum);
    }
}

// Taps `from` .. `to` after the last one that reaches every output; the D-th after misses the last D.
template <int D, int R, int T>
static RK_INLINE void add_right(const Correlation& c, int from, int to, const float* w, const float* x,
                                Vec (&sum)[R][T]) {
    if constexpr (D < T) {
        if (D > to) return;
        if (D >= from) add_tap<0, T - D>(w + D * c.w_step, x + D * kLanes, c.x_pitch, sum);
        add_right<D + 1>(c, from, to, w, x, sum);
    }
}

// Adds the taps of all columns to R rows of outputs from `row`, all T columns; all rows have the same `taps`.
// Needs T <= x_cols.
template <int R, int T>
static void add_block(const Correlation& c, Range taps, int row) {
    Vec sum[R][T] = {};
    const int last_tap = c.kernel_cols - 1, lead = c.pad_left;
    const int trail = c.x_cols - T + lead;  // the last tap that reaches every output
    const int first = larger(0, lead), last = smaller(last_tap, trail);
    for (int k = taps.begin; k < taps.end; k++) {
        const float* x = c.x + (row + k - c.pad_top) * c.x_pitch;
        const float* w = c.w + k * c.w_pitch;
        if (lead > 0) add_left<1>(c, larger(1, lead - last_tap), lead, w + lead * c.w_step, x, sum);
        const float* xl = x + int64_t(first - lead) * kLanes;
        const float* wl = w + first * c.w_step;
#pragma GCC unroll 1
        for (int l = first; l <= last; l++, xl += kLanes, wl += c.w_step) add_tap<0, T>(wl, xl, c.x_pitch, sum);
        if (last_tap > trail)
            add_right<1>(c, larger(1, -trail), last_tap - trail, w + trail * c.w_step,
                         x + int64_t(c.x_cols - T) * kLanes, sum);
    }
    store_sums(c, c.y + row * c.y_pitch, sum);
}

// ---------------------------------------------------------------- tables of kernels

typedef void (*TapsKernel)(const Correlation&, const Part&, int col, int blocks);
typedef void (*BlockKernel)(const Correlation&, Range taps, int row);

template <int K, int T, bool Packed>
static constexpr TapsKernel taps_kernel() {
    if constexpr (T <= cols_at_once(K) && (Packed || (K % 2 && K > 1)))
        return add_taps<K, T, Packed>;
    else
        return nullptr;
}

template <bool Packed, class Widths = Indices<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>>
struct TapsKernels;

template <bool Packed, int... T>
struct TapsKernels<Packed, Indices<T...>> {
    static constexpr TapsKernel table[kMaxTaps][kMaxCols] = {
        {taps_kernel<1, T, Packed>()...}, {taps_kernel<2, T, Packed>()...}, {taps_kernel<3, T, Packed>()...},
        {taps_kernel<4, T, Packed>()...}, {taps_kernel<5, T, Packed>()...}, {taps_kernel<6, T, Packed>()...},
        {taps_kernel<7, T, Packed>()...},
    };
};

template <int R, int T>
static constexpr BlockKernel block_kernel() {
    if constexpr (R <= rows_at_once(T))
        return add_block<R, T>;
    else
        return nullptr;
}

template <class Widths = Indices<1, 2, 3, 4, 5, 6>>
struct BlockKernels;

template <int... T>
struct BlockKernels<Indices<T...>> {
    static constexpr BlockKernel table[kMaxBlockRows][kMaxBlockCols] = {
        {block_kernel<1, T>()...},
        {block_kernel<2, T>()...},
        {block_kernel<3, T>()...},
    };
};

}  // namespace RK_ISA

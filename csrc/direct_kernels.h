// Register-blocked loops of the direct algorithm on lane-interleaved buffers.
//
// Both kernels compute a block of R x T outputs of a correlation with all sums in registers:
//   slide_taps   each tap of the filter is loaded once and multiplied with R x T inputs. At the borders of the
//                map only the outputs that the tap reaches take part, so padding is never multiplied.
//   full_rows    where every input reaches every output (filters at least twice as wide as the map): each input
//                is loaded once and multiplied with R x T taps.
// The products of one call stay below kTapsPerSum for each output; longer sums are split by the caller and added
// up in memory, because one float32 sum of a thousand products loses a decimal digit.
#pragma once

#include "pack.h"

namespace RK_ISA {

constexpr int kMaxCols = 14;
constexpr int kTapsPerSum = 81;
#if RK_LANES == 16 || defined(__aarch64__)  // 32 vector registers
constexpr int kMaxSums = 28;
#else
constexpr int kMaxSums = 14;
#endif
constexpr int kMaxRows = 3;

// Rows of outputs computed at once when `cols` columns are.
constexpr int rows_at_once(int cols) { return kMaxSums / cols < kMaxRows ? kMaxSums / cols : kMaxRows; }

struct Strip {
    const float* x;  // column 0 of the input row under the first kernel row and the first output row
    int64_t x_pitch;
    const float* w;  // first tap
    int64_t w_pitch, w_step;
    int kernel_rows, kernel_cols, x_cols;
    int lead;  // output t under tap k reads column t + k - lead
    float* y;
    int64_t y_pitch, y_step;
    Vec start;  // of the sums, unless they are added to y
    bool add, relu;
};

template <int R, int T>
static RK_INLINE void store_sums(const Strip& s, Vec (&sum)[R][T]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            float* y = s.y + r * s.y_pitch + t * s.y_step;
            const Vec v = sum[r][t] + (s.add ? load(y) : s.start);
            store(y, s.relu ? max_with_zero(v) : v);
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
static RK_INLINE void add_left_taps(const Strip& s, int from, int to, const float* w, const float* x,
                                    Vec (&sum)[R][T]) {
    if constexpr (D < T) {
        if (D > to) return;
        if (D >= from) add_tap<D, T>(w - D * s.w_step, x, s.x_pitch, sum);
        add_left_taps<D + 1>(s, from, to, w, x, sum);
    }
}

// Taps `from` .. `to` after the last one that reaches every output; the D-th after misses the last D.
template <int D, int R, int T>
static RK_INLINE void add_right_taps(const Strip& s, int from, int to, const float* w, const float* x,
                                     Vec (&sum)[R][T]) {
    if constexpr (D < T) {
        if (D > to) return;
        if (D >= from) add_tap<0, T - D>(w + D * s.w_step, x + D * kLanes, s.x_pitch, sum);
        add_right_taps<D + 1>(s, from, to, w, x, sum);
    }
}

static RK_INLINE int larger(int a, int b) { return a > b ? a : b; }
static RK_INLINE int smaller(int a, int b) { return a < b ? a : b; }

// Needs T <= x_cols.
template <int R, int T>
static void slide_taps(const Strip& s) {
    Vec sum[R][T] = {};
    const int last_tap = s.kernel_cols - 1;
    const int trail = s.x_cols - T + s.lead;  // the last tap that reaches every output
    const int first = larger(0, s.lead), last = smaller(last_tap, trail);
    const int left_from = larger(1, s.lead - last_tap), right_to = last_tap - trail;
    for (int row = 0; row < s.kernel_rows; row++) {
        const float* x = s.x + row * s.x_pitch;
        const float* w = s.w + row * s.w_pitch;
        if (s.lead > 0) add_left_taps<1>(s, left_from, s.lead, w + s.lead * s.w_step, x, sum);
        const float* xk = x + int64_t(first - s.lead) * kLanes;
        const float* wk = w + first * s.w_step;
#pragma GCC unroll 1
        for (int tap = first; tap <= last; tap++, xk += kLanes, wk += s.w_step) add_tap<0, T>(wk, xk, s.x_pitch, sum);
        if (right_to > 0)
            add_right_taps<1>(s, larger(1, -trail), right_to, w + trail * s.w_step,
                              x + int64_t(s.x_cols - T) * kLanes, sum);
    }
    store_sums(s, sum);
}

// kernel_rows counts input rows here, and `w` is the tap with which input (0, 0) reaches output (0, 0).
template <int R, int T, int Step>
static void full_rows(const Strip& s) {
    Vec sum[R][T] = {};
    for (int row = 0; row < s.kernel_rows; row++) {
        const float* x = s.x + row * s.x_pitch;
        const float* w = s.w + row * s.w_pitch;
#pragma GCC unroll 1
        for (int col = 0; col < s.x_cols; col++, x += kLanes, w += Step) {
            const Vec v = load(x);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) sum[r][t] += v * load(w - r * s.w_pitch - t * Step);
        }
    }
    store_sums(s, sum);
}

typedef void (*StripKernel)(const Strip&);

template <int R, int T>
static constexpr StripKernel slide_taps_or_null() {
    if constexpr (R <= rows_at_once(T))
        return slide_taps<R, T>;
    else
        return nullptr;
}

template <int R, int T, int Step>
static constexpr StripKernel full_rows_or_null() {
    if constexpr (R <= rows_at_once(T))
        return full_rows<R, T, Step>;
    else
        return nullptr;
}

// Kernels by [rows - 1][columns - 1]; those that need more registers than there are are null.
template <class Widths>
struct KernelTable;

template <int... T>
struct KernelTable<Indices<T...>> {
    static constexpr StripKernel slide[kMaxRows][kMaxCols] = {
        {slide_taps_or_null<1, T>()...},
        {slide_taps_or_null<2, T>()...},
        {slide_taps_or_null<3, T>()...},
    };
    template <int Step>
    static constexpr StripKernel full[kMaxRows][kMaxCols] = {
        {full_rows_or_null<1, T, Step>()...},
        {full_rows_or_null<2, T, Step>()...},
        {full_rows_or_null<3, T, Step>()...},
    };
};

using Kernel = KernelTable<Indices<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>>;

}  // namespace RK_ISA

// Products of packed maps with filters of which every input reaches every output: rows x cols inputs, as many outputs and
// 2 rows - 1 x 2 cols - 1 taps.
#pragma once

#include "direct_plan.h"

namespace RK_ISA {
namespace direct {

// Taps of a filter in the order of their use, `step` floats apart.
struct Taps {
    const float* first;
    int64_t step;
};

// y = start + filter * x on packed maps of `rows` x `cols` pixels; without `start`, zero.
struct Product {
    int rows, cols;
    Taps filter;
    const float *x, *start;
    float* y;
    int products;  // of one sum; longer sums are split
};

// GCC keeps taps that two inputs share, and spills sums for them where registers are few.
static RK_INLINE void forget_loads() {
    if constexpr (kRegisters == 16) asm volatile("" ::: "memory");
}

template <int R, int T, int Step>
static RK_INLINE void add_input(const float* x, const float* w, int64_t w_pitch, Vec (&sum)[R][T]) {
    const Vec v = load(x);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sum[r][t] += v * load(w - r * w_pitch - t * Step);
    forget_loads();
}

// T columns of outputs from `col`, in blocks of R rows from `row` to before `end`, with taps Step floats apart. Square: x has T
// columns as well.
template <int R, int T, bool Square, int Step>
static void multiply_blocks(const Product& p, int row, int end, int col) {
    const int rows = p.rows, cols = Square ? T : p.cols;
    const Split parts(rows, larger(1, p.products / cols));
    const int64_t pitch = cols * kLanes, w_pitch = (2 * cols - 1) * Step;
    const float *const first_x = p.x, *const first_w = p.filter.first + (rows - 1) * w_pitch + (cols - 1 - col) * Step;
    for (; row < end; row += R) {
        const float *x = first_x, *w = first_w - row * w_pitch;
        const int64_t corner = row * pitch + col * kLanes;
        float* const y = p.y + corner;
        const float* start = p.start ? p.start + corner : nullptr;
        for (int part = 0; part < parts.parts; part++, start = y) {
            Vec sum[R][T] = {};
            for (int i = parts.begin(part), last = parts.end(part); i < last; i++, x += pitch, w += w_pitch) {
                if constexpr (Square) {
#pragma GCC unroll 16
                    for (int j = 0; j < T; j++) add_input<R, T, Step>(x + j * kLanes, w + j * Step, w_pitch, sum);
                } else {
#pragma GCC unroll 1
                    for (int j = 0; j < cols; j++) add_input<R, T, Step>(x + j * kLanes, w + j * Step, w_pitch, sum);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) {
                    const int64_t at = r * pitch + t * kLanes;
                    store(y + at, start ? sum[r][t] + load(start + at) : sum[r][t]);
                }
        }
    }
}

// Rows of outputs at once, for `cols` columns: every tap is loaded anew for each of them, so that more sums would save
// nothing; with 28 of AVX-512 GCC spills half of them.
constexpr int full_rows(int cols) { return 14 / cols < kMaxBlockRows ? 14 / cols : kMaxBlockRows; }

typedef void (*BlockProduct)(const Product&, int row, int end, int col);

template <int R, int T, bool Square, int Step>
static constexpr BlockProduct block_product() {
    if constexpr (R <= full_rows(T))
        return multiply_blocks<R, T, Square, Step>;
    else
        return nullptr;
}

template <bool Square, int Step, class Widths = Indices<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>>
struct BlockProducts;

template <bool Square, int Step, int... T>
struct BlockProducts<Square, Step, Indices<T...>> {
    static constexpr BlockProduct table[kMaxBlockRows][kMaxCols] = {
        {block_product<1, T, Square, Step>()...},
        {block_product<2, T, Square, Step>()...},
        {block_product<3, T, Square, Step>()...},
    };
};

template <int Step>
static void multiply_by(const Product& p) {
    const Split blocks(p.cols, kMaxCols);
    const auto& kernels = blocks.parts == 1 ? BlockProducts<true, Step>::table : BlockProducts<false, Step>::table;
    for (int block = 0; block < blocks.parts; block++) {
        const int col = blocks.begin(block), width = blocks.end(block) - col;
        const int most = full_rows(width), rest = p.rows % most;
        kernels[most - 1][width - 1](p, 0, p.rows - rest, col);
        if (rest) kernels[rest - 1][width - 1](p, p.rows - rest, p.rows, col);
    }
}

static void multiply(const Product& p) {
    if (p.filter.step == kLanes)
        multiply_by<kLanes>(p);
    else
        multiply_by<RK_FILTER_LANES>(p);
}

}  // namespace direct
}  // namespace RK_ISA

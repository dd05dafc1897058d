// A map where every input reaches every output, multiplied by halves of its rows and columns (Karatsuba).
//
// Halves x0, x1 and y0, y1 of an axis, and the taps before, around and after the middle, A, B and C, make three products
// where the definition takes four. Rows are halved by
//   y0 = B (x0 + x1) + (C - B) x1    y1 = B (x0 + x1) + (A - B) x0
// and columns by
//   y0 = B (x0 - x1) + (C + B) x1    y1 = (A + B) x0 - B (x0 - x1)
// Where all inputs are positive the sum grows, where all taps are the other one does: one of each keeps rounding errors
// small. An infinity becomes a NaN.
//
// A map of halved columns lies in memory as its left half and its right half.
#pragma once

#include "direct_product.h"

namespace RK_ISA {
namespace direct {

constexpr int kFewestHalved = 10;

// The blocks of a map that are multiplied: all of it, or its halves.
struct Blocks {
    int rows, cols;
    bool halved_rows, halved_cols;
};

static bool is_halved(int64_t size) { return size % 2 == 0 && size >= kFewestHalved; }

static Blocks blocks_of(const rk_problem& p) {
    const bool rows = is_halved(p.in_h), cols = is_halved(p.in_w);
    return {int(rows ? p.in_h / 2 : p.in_h), int(cols ? p.in_w / 2 : p.in_w), rows, cols};
}

static bool is_whole(const Blocks& b) { return !b.halved_rows && !b.halved_cols; }
static int64_t block_floats(const Blocks& b) { return int64_t(b.rows) * b.cols * kLanes; }
static int64_t factor_floats(const Blocks& b) { return int64_t(2 * b.rows - 1) * (2 * b.cols - 1) * kLanes; }

// The taps of an axis that are multiplied: B, C -+ B, A -+ B; where it is not halved, all of them.
enum Factor { kAround, kAfter, kBefore, kFactors };

static int64_t factors_floats(const Blocks& b) {
    return (b.halved_rows ? kFactors : 1) * (b.halved_cols ? kFactors : 1) * factor_floats(b);
}

// The factors of a filter of rows and columns, one behind the other.
template <bool Rows, bool Cols>
static void make_factors_of(const Blocks& b, Taps filter, float* factors) {
    constexpr int kRows = Rows ? kFactors : 1, kCols = Cols ? kFactors : 1;
    const int rows = 2 * b.rows - 1, cols = 2 * b.cols - 1;
    const int64_t pitch = (Cols ? 4 * b.cols - 1 : cols) * filter.step, step = filter.step;
    const int64_t down = b.rows * pitch, right = b.cols * step, next = factor_floats(b);
    const float* line = filter.first;
    for (int row = 0; row < rows; row++, line += pitch) {
        const float* tap = line;
        for (int col = 0; col < cols; col++, tap += step, factors += kLanes) {
            Vec of_row[kCols][kRows];
#pragma GCC unroll 3
            for (int j = 0; j < kCols; j++) {
                const float* const before = tap + j * right;
                of_row[j][0] = load(Rows ? before + down : before);
                if constexpr (Rows) {
                    of_row[j][kAfter] = load(before + 2 * down) - of_row[j][0];
                    of_row[j][kBefore] = load(before) - of_row[j][0];
                }
            }
#pragma GCC unroll 3
            for (int i = 0; i < kRows; i++) {
                float* const target = factors + i * kCols * next;
                const Vec around = of_row[Cols ? 1 : 0][i];
                store(target, around);
                if constexpr (Cols) {
                    store(target + kAfter * next, of_row[2][i] + around);
                    store(target + kBefore * next, of_row[0][i] + around);
                }
            }
        }
    }
}

static void make_factors(const Blocks& b, Taps filter, float* factors) {
    if (b.halved_rows && b.halved_cols)
        make_factors_of<true, true>(b, filter, factors);
    else if (b.halved_rows)
        make_factors_of<true, false>(b, filter, factors);
    else
        make_factors_of<false, true>(b, filter, factors);
}

// Products in one float32 sum; sums of blocks add up.
static int products_of_sum(const Blocks& b) { return is_whole(b) ? 56 : 28; }

static void multiply_by_factor(const Blocks& b, Taps factors, Factor row, Factor col, const float* x, const float* start,
                               float* y) {
    const int64_t index = row * (b.halved_cols ? kFactors : 1) + col;
    const Taps factor = {factors.first + index * factor_floats(b), factors.step};
    multiply({b.rows, b.cols, factor, x, start, y, products_of_sum(b)});
}

// Some rows; the right half of a map is `right` floats behind its left one. `scratch` holds two blocks.
static void multiply_columns(const Blocks& b, Taps factors, Factor row, const float* x, const float* start, float* y,
                             int64_t right, float* scratch) {
    if (!b.halved_cols) return multiply_by_factor(b, factors, row, kAround, x, start, y);
    const int64_t floats = block_floats(b);
    float *const difference = scratch, *const common = scratch + floats;
    for (int64_t i = 0; i < floats; i += kLanes) store(difference + i, load(x + i) - load(x + right + i));
    multiply_by_factor(b, factors, row, kAround, difference, nullptr, common);
    for (int64_t i = 0; i < floats; i += kLanes) {
        const Vec v = load(common + i);
        store(y + i, start ? load(start + i) + v : v);
        store(y + right + i, start ? load(start + right + i) - v : -v);
    }
    multiply_by_factor(b, factors, row, kAfter, x + right, y, y);
    multiply_by_factor(b, factors, row, kBefore, x, y + right, y + right);
}

// The floats of what `multiply_map` needs beside its map.
static int64_t scratch_floats(const Blocks& b) { return (2 * (b.halved_cols ? 2 : 1) + 2) * block_floats(b); }

static void multiply_map(const Blocks& b, Taps factors, const float* x, float* y, float* scratch) {
    const int64_t floats = block_floats(b), right = b.halved_rows ? 2 * floats : floats;
    if (!b.halved_rows) return multiply_columns(b, factors, kAround, x, nullptr, y, right, scratch);
    const int halves = b.halved_cols ? 2 : 1;
    float *const sum = scratch, *const common = sum + floats, *const rest = sum + halves * 2 * floats;
    for (int half = 0; half < halves; half++) {
        const float* const upper = x + half * right;
        for (int64_t i = 0; i < floats; i += kLanes)
            store(sum + half * right + i, load(upper + i) + load(upper + floats + i));
    }
    multiply_columns(b, factors, kAround, sum, nullptr, common, right, rest);
    multiply_columns(b, factors, kAfter, x + floats, common, y, right, rest);
    multiply_columns(b, factors, kBefore, x, common, y + floats, right, rest);
}

}  // namespace direct
}  // namespace RK_ISA

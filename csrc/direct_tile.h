// The direct algorithm on one tile: a correlation of one group of channels, all operands lane-interleaved.
#pragma once

#include "direct_kernels.h"

namespace RK_ISA {

// y[i][j] = (add ? y[i][j] : start) + sum of w[k][l] * x[i + k - pad_top][j + l - pad_left] over the pixels of x
// that exist; then clamped at zero when `relu`.
struct Correlation {
    const float* x;
    int64_t x_pitch;
    int x_rows, x_cols;
    const float* w;
    int64_t w_pitch, w_step;  // negative for a flipped filter
    int kernel_rows, kernel_cols, pad_top, pad_left;
    float* y;
    int64_t y_pitch, y_step;
    int y_rows, y_cols;
    Vec start;
    bool add, relu;
};

// A range of indices.
struct Range {
    int begin, end;
};

static RK_INLINE Range intersect(Range a, Range b) { return {larger(a.begin, b.begin), smaller(a.end, b.end)}; }
static RK_INLINE bool is_empty(Range r) { return r.begin >= r.end; }

// The taps of output row `row` that meet rows of x.
static RK_INLINE Range taps_of_row(const Correlation& c, int row) {
    return {larger(0, c.pad_top - row), smaller(c.kernel_rows, c.x_rows + c.pad_top - row)};
}

// Widths of the blocks of a row: `count` of `width`, then one of `rest`.
struct Blocks {
    int width, count, rest;
};

static Blocks split_columns(int cols, int widest) {
    const int width = (cols - 1) / ((cols - 1) / widest + 1) + 1;
    return {width, cols / width, cols % width};
}

// Runs `block(col, width)` over the columns of a row.
template <class Block>
static RK_INLINE void for_each_block(const Blocks& blocks, Block block) {
    for (int i = 0; i < blocks.count; i++) block(i * blocks.width, blocks.width);
    if (blocks.rest) block(blocks.count * blocks.width, blocks.rest);
}

// Runs `rows(row, count)` over the output rows: as many at once as registers allow where `uniform(row, count)`
// says that they meet the same taps, one by one elsewhere.
template <class Uniform, class Rows>
static RK_INLINE void for_each_row_block(int rows, int at_once, Uniform uniform, Rows run) {
    for (int row = 0; row < rows;) {
        const int count = smaller(at_once, rows - row);
        if (count > 1 && uniform(row, count)) {
            run(row, count);
            row += count;
        } else {
            run(row++, 1);
        }
    }
}

// Whether the sums of an output have to be touched in this pass over some of its taps.
static RK_INLINE bool has_effect(const Correlation& c, bool first, bool last, bool empty) {
    return !empty || (first && !c.add) || (last && c.relu);
}

// No tap meets a pixel.
static void correlate_nothing(const Correlation& c) {
    for (int row = 0; row < c.y_rows; row++)
        for (int col = 0; col < c.y_cols; col++) {
            float* y = c.y + row * c.y_pitch + col * c.y_step;
            const Vec v = c.add ? load(y) : c.start;
            store(y, c.relu ? max_with_zero(v) : v);
        }
}

static bool is_nothing(const Correlation& c) {
    return !c.x_rows || !c.x_cols || !c.kernel_rows || !c.kernel_cols;
}

// The order in which the products of an output are added up depends on the column of the output only.
static void correlate_sliding(const Correlation& c) {
    if (is_nothing(c)) return correlate_nothing(c);
    const Blocks blocks = split_columns(c.y_cols, smaller(kMaxCols, c.x_cols));
    const int chunk = larger(1, kTapsPerSum / smaller(c.kernel_cols, c.x_cols));
    for (int begin = 0; begin < c.kernel_rows; begin += chunk) {
        const Range taps = {begin, smaller(begin + chunk, c.kernel_rows)};
        const bool first = begin == 0, last = taps.end == c.kernel_rows;
        const auto of_row = [&](int row) { return intersect(taps, taps_of_row(c, row)); };
        const auto uniform = [&](int row, int count) {
            const Range a = of_row(row), b = of_row(row + count - 1);
            return a.begin == b.begin && a.end == b.end;
        };
        for_each_row_block(c.y_rows, rows_at_once(blocks.width), uniform, [&](int row, int count) {
            const Range reached = of_row(row);
            const bool empty = is_empty(reached);
            if (!has_effect(c, first, last, empty)) return;
            Strip s;
            s.x = c.x + (row + reached.begin - c.pad_top) * c.x_pitch;
            s.x_pitch = c.x_pitch;
            s.w = c.w + reached.begin * c.w_pitch;
            s.w_pitch = c.w_pitch;
            s.w_step = c.w_step;
            s.kernel_rows = empty ? 0 : reached.end - reached.begin;
            s.kernel_cols = c.kernel_cols;
            s.x_cols = c.x_cols;
            s.y_pitch = c.y_pitch;
            s.y_step = c.y_step;
            s.start = c.start;
            s.add = c.add || !first;
            s.relu = c.relu && last;
            for_each_block(blocks, [&](int col, int width) {
                s.lead = c.pad_left - col;
                s.y = c.y + row * c.y_pitch + col * c.y_step;
                Kernel::slide[count - 1][width - 1](s);
            });
        });
    }
}

// Whether every column of x reaches every column of y, through adjacent taps.
static bool reaches_everywhere(const Correlation& c) {
    return (c.w_step == kLanes || c.w_step == -kLanes) && c.pad_left >= c.y_cols - 1 &&
           c.kernel_cols >= c.x_cols + c.pad_left;
}

static void correlate_full_rows(const Correlation& c) {
    const Blocks blocks = split_columns(c.y_cols, kMaxCols);
    const auto& kernels = c.w_step > 0 ? Kernel::full<kLanes> : Kernel::full<-kLanes>;
    const int chunk = larger(1, kTapsPerSum / c.x_cols);
    for (int begin = 0; begin < c.x_rows; begin += chunk) {
        const Range part = {begin, smaller(begin + chunk, c.x_rows)};
        const bool first = begin == 0, last = part.end == c.x_rows;
        const auto of_row = [&](int row) {  // rows of x
            return intersect(part, {row - c.pad_top, row - c.pad_top + c.kernel_rows});
        };
        const auto uniform = [&](int row, int count) {
            const Range a = of_row(row), b = of_row(row + count - 1);
            return a.begin == b.begin && a.end == b.end;
        };
        for_each_row_block(c.y_rows, rows_at_once(blocks.width), uniform, [&](int row, int count) {
            const Range reached = of_row(row);
            const bool empty = is_empty(reached);
            if (!has_effect(c, first, last, empty)) return;
            Strip s;
            s.x = c.x + reached.begin * c.x_pitch;
            s.x_pitch = c.x_pitch;
            s.w_pitch = c.w_pitch;
            s.w_step = c.w_step;
            s.kernel_rows = empty ? 0 : reached.end - reached.begin;
            s.kernel_cols = c.kernel_cols;
            s.x_cols = c.x_cols;
            s.lead = 0;
            s.y_pitch = c.y_pitch;
            s.y_step = c.y_step;
            s.start = c.start;
            s.add = c.add || !first;
            s.relu = c.relu && last;
            for_each_block(blocks, [&](int col, int width) {
                s.w = c.w + (reached.begin - row + c.pad_top) * c.w_pitch + (c.pad_left - col) * c.w_step;
                s.y = c.y + row * c.y_pitch + col * c.y_step;
                kernels[count - 1][width - 1](s);
            });
        });
    }
}

static void correlate(const Correlation& c) {
    if (!is_nothing(c) && reaches_everywhere(c))
        correlate_full_rows(c);
    else
        correlate_sliding(c);
}

}  // namespace RK_ISA

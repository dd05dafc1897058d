// The direct algorithm on one tile: a correlation of one group of channels.
#pragma once

#include "direct_kernels.h"
#include "phase.h"

namespace RK_ISA {

// One float32 sum of a thousand products loses a digit: longer ones are split and added up in memory.
constexpr int kTapsPerSum = 98;

// A size split evenly into parts of at most `most`.
struct Split {
    int size, parts;

    Split(int size, int most) : size(size), parts(size > 0 && size <= most ? 1 : (size + most - 1) / most) {}
    int begin(int part) const { return part == 0 ? 0 : part == parts ? size : int(int64_t(size) * part / parts); }
    int end(int part) const { return begin(part + 1); }
};

static void correlate_nothing(const Correlation& c) {
    for (int row = 0; row < c.y_rows; row++)
        for (int col = 0; col < c.y_cols; col++) {
            float* y = c.y + row * c.y_pitch + col * c.y_step;
            const Vec v = c.add ? load(y) : c.start;
            store(y, c.relu ? max_with_zero(v) : v);
        }
}

// Calls `run(part, first, last)` for parts of the rows whose products fit one sum.
template <class Run>
static RK_INLINE void for_each_part(const Correlation& c, int taps_per_row, Run run) {
    const Split split(c.split_taps ? c.kernel_rows : c.x_rows, larger(1, kTapsPerSum / taps_per_row));
    for (int i = 0; i < split.parts; i++) {
        const int shift = c.split_taps ? 0 : c.pad_top;
        run(Part{split.begin(i) + shift, split.end(i) + shift, !c.split_taps}, i == 0, i == split.parts - 1);
    }
}

// A few columns of taps at a time.
static void correlate_by_taps(const Correlation& c) {
    const Split columns(c.kernel_cols, kMaxTaps);
    for (int i = 0; i < columns.parts; i++) {
        const int from = columns.begin(i), taps = columns.end(i) - from;
        const auto& table = c.x_step == kLanes ? TapsKernels<true>::table : TapsKernels<false>::table;
        const auto& kernels = table[taps - 1];
        const int widest = cols_at_once(taps);
        int width = c.y_cols, blocks = 1;
        if (width > widest) {
            width = int(divide_up(c.y_cols, divide_up(c.y_cols, widest)));
            blocks = c.y_cols / width;
        }
        const int rest = c.y_cols - blocks * width;
        for_each_part(c, smaller(taps, c.x_cols), [&](const Part& part, bool first, bool last) {
            Correlation some = c;
            some.w += from * c.w_step;
            some.kernel_cols = taps;
            some.pad_left -= from;
            some.add = c.add || i > 0 || !first;
            some.relu = c.relu && i == columns.parts - 1 && last;
            kernels[width - 1](some, part, 0, blocks);
            if (rest) kernels[rest - 1](some, part, blocks * width, 1);
        });
    }
}

// All columns of taps, for outputs of few columns.
static void correlate_by_blocks(const Correlation& c) {
    const int at_once = rows_at_once(c.y_cols);
    for_each_part(c, smaller(c.kernel_cols, c.x_cols), [&](const Part& part, bool first, bool last) {
        Correlation some = c;
        some.add = c.add || !first;
        some.relu = c.relu && last;
        for (int row = 0, count; row < c.y_rows; row += count) {
            const Range taps = taps_of_row(c, part, row);
            count = smaller(at_once, c.y_rows - row);
            if (count > 1) {
                const Range last_taps = taps_of_row(c, part, row + count - 1);
                if (last_taps.begin != taps.begin || last_taps.end != taps.end) count = 1;
            }
            if (taps.begin < taps.end || !some.add || some.relu)
                BlockKernels<>::table[count - 1][c.y_cols - 1](some, taps, row);
        }
    });
}

// The order in which the products of an output are added up depends neither on where its row lies in y nor on how
// many rows y has, when `split_taps`.
static void correlate(const Correlation& c) {
    const bool few_columns = c.y_cols <= kMaxBlockCols && 3 * c.y_cols <= c.kernel_cols && c.y_cols <= c.x_cols;
    if (!c.x_rows || !c.x_cols || !c.kernel_rows || !c.kernel_cols)
        correlate_nothing(c);
    else if (few_columns && c.x_step == kLanes)
        correlate_by_blocks(c);
    else
        correlate_by_taps(c);
}

}  // namespace RK_ISA

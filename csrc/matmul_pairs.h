// Products of float32 matrices by pairs (channel_pairs.h).
//
// Rows of the left one and columns of the right one are each scaled by a power of two to the size of one.
#pragma once

#include "channel_pairs.h"
#include "matmul_copied.h"

namespace RK_ISA {
namespace matmul {

static_assert(kPart == kScaled);

struct ByPairs {
    static constexpr int64_t kMostRows = 208;

    struct Left {
        PairedRows rows;
        int64_t depth;

        static int64_t floats(int64_t rows, int64_t depth) { return PairedRows::floats(rows, depth); }
        Left(float* memory, int64_t rows, int64_t depth) : rows(memory, rows, depth), depth(depth) {}

        float* at(int64_t row, int64_t k) const { return rows.at(k / kDepth, row) + k % kDepth; }
        void copy(int64_t row, const float* numbers) const { scale_row(numbers, kDepth, depth, nullptr, rows, row); }
        void finish(int64_t row) const {
            scale_row(at(row, 0), rows.count * PairedRows::kStride, depth, nullptr, rows, row);
        }
        void multiply(const Product& p, int64_t group, int64_t next) const {
            multiply_group(p, {rows, 0, {0, depth}}, {0, rows.count}, group, weights_of(p, next, {0, depth}), nullptr);
        }
    };

    // How large columns are, from their sums of squares and largest numbers.
    struct Sizes {
        Vec squares = {}, largest = {};
        RK_INLINE void add(Vec v) { add_size(v, squares, largest); }
    };

    struct Right {
        float *data, *scales, *pair_sums;
        int64_t depth;

        static int64_t floats(int64_t columns, int64_t depth) { return columns * (depth + 2); }
        Right(float* memory, int64_t columns, int64_t depth)
            : data(memory + 2 * columns), scales(memory), pair_sums(memory + columns), depth(depth) {}

        float* at(int64_t column) const { return column_at(data, depth, column); }
        void describe(Product& p) const { p.packed = data, p.output_sizes = scales, p.pair_sums = pair_sums; }

        // Scales a vector of columns, and sums up what its pairs add.
        void finish(int64_t column, const Sizes& sizes) const {
            float* const w = at(column);
            Vec scale, sum = {};
            for (int lane = 0; lane < kLanes; lane++) {
                scale[lane] = power_of_two(1 / size_of(sizes.squares[lane], sizes.largest[lane], depth));
                scales[column + lane] = 1 / scale[lane];
            }
            const auto scaled = [&](int64_t k) __attribute__((always_inline)) {
                const Vec v = load(w + k * kPanel) * scale;
                store(w + k * kPanel, v);
                return v;
            };
            for (int64_t begin = 0; begin < depth; begin += kDepth) {
                const int64_t end = smaller(begin + kDepth, depth), paired = begin + paired_channels(end - begin);
                for (int64_t k = begin; k < paired; k += 4) {
                    const Vec added = scaled(k) * scaled(k + 1);
                    sum += added - scaled(k + 2) * scaled(k + 3);
                }
                for (int64_t k = paired; k < end; k++) scaled(k);
            }
            store(pair_sums + column, sum);
        }
    };
};

static size_t workspace_bytes(const MatrixProduct& c) { return plan_of<ByPairs>(c).floats * sizeof(float); }
static void run(const MatrixProduct& c, float* output, float* workspace) { multiply<ByPairs>(c, output, workspace); }

}  // namespace matmul
}  // namespace RK_ISA

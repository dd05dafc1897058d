// Products of float32 matrices by multiply-adds.
#pragma once

#include "matmul_copied.h"

namespace RK_ISA {
namespace matmul {

struct Plainly {
    static constexpr int64_t kMostRows = 192;

    struct Left {
        int64_t rows, depth, stride;
        float *data, *sums;

        // With a line between: measured.
        static int64_t floats(int64_t rows, int64_t depth) {
            return rows * padded(depth) + kLine + ceil_div(rows, kTileRows) * kTileRows * kGroup;
        }
        Left(float* memory, int64_t rows, int64_t depth)
            : rows(rows), depth(depth), stride(padded(depth)), data(memory), sums(memory + rows * padded(depth) + kLine) {}

        float* at(int64_t row, int64_t k) const { return data + row * stride + k; }
        void copy(int64_t row, const float* numbers) const { memcpy(at(row, 0), numbers, depth * sizeof(float)); }
        void finish(int64_t) const {}
        void multiply(const Product& p, int64_t group, int64_t next) const {
            compute_group(p, {{data, stride}, 0, rows}, group, false, group_of(p, next), sums);
        }
    };

    struct Right {
        float* data;
        int64_t depth;

        static int64_t floats(int64_t columns, int64_t depth) { return columns * depth; }
        Right(float* memory, int64_t, int64_t depth) : data(memory), depth(depth) {}

        float* at(int64_t column) const { return column_at(data, depth, column); }
        void describe(Product& p) const { p.packed = data; }
        template <class Sizes>
        void finish(int64_t, const Sizes&) const {}
    };

    struct Sizes {
        void add(Vec) {}
    };
};

static size_t workspace_bytes(const MatrixProduct& c) { return plan_of<Plainly>(c).floats * sizeof(float); }
static void run(const MatrixProduct& c, float* output, float* workspace) { multiply<Plainly>(c, output, workspace); }

}  // namespace matmul
}  // namespace RK_ISA

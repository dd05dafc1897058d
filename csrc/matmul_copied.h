// Products of float32 matrices, for training, whose weights change with each step.
//
// Both matrices are copied, a part of the depth after the other: rows of the left one, and columns of the right one into the
// panels of a packed weight. Each element is a sum in the order of the depth, whatever the number of threads.
//
// How they are multiplied is up to `Way` (matmul_rows.h, matmul_pairs.h):
//
//   Way::kMostRows                             that a thread takes on: their copies stay in the second level cache
//   Way::Left left(memory, rows, depth);       some rows of a part of the depth, in Left::floats(rows, depth)
//     left.copy(row, numbers);                 fills in a row
//     left.at(row, k), left.finish(row);       or where it is written, and what follows
//     left.multiply(product, group, next);     with a group of columns, before the next one
//   Way::Right right(memory, columns, depth);  all columns of a part of the depth, in Right::floats(columns, depth)
//     right.at(column), right.finish(column, sizes);  where a vector of them is written, and what follows
//     right.describe(product);
//   Way::Sizes: add(vector)                    what is gathered of a vector of columns on its way
#pragma once

#include "matrix.h"
#include "pointwise_rows.h"

namespace RK_ISA {
namespace matmul {

using namespace pointwise;

constexpr int64_t kPart = 512;                       // of the depth
constexpr int64_t kLeftAhead = 2, kRightAhead = 16;  // rows of either matrix that are fetched before they are copied
constexpr int64_t kTogether = 2;                     // groups that are copied side by side: longer pieces of each row

static RK_INLINE int64_t depth_parts(int64_t depth) { return ceil_div(depth, kPart); }
static RK_INLINE Span depth_part(int64_t depth, int64_t i) { return {i * kPart, smaller((i + 1) * kPart, depth)}; }

// Where a vector of columns is in panels.
static RK_INLINE float* column_at(float* panels, int64_t depth, int64_t column) {
    return panels + column / kPanel * depth * kPanel + column % kPanel;
}

// Some groups of columns of the right matrix, from `column` on, of which `columns` are left.
template <class Way, int kGroups>
static void copy_columns(const float* from, int64_t stride, int64_t depth, int64_t column, int64_t columns,
                         const typename Way::Right& to) {
    constexpr int kWide = kGroups * kGroup / kLanes;
    typename Way::Sizes sizes[kWide];
    for (int64_t k = 0; k < depth; k++, from += stride)
#pragma GCC unroll 16
        for (int v = 0; v < kWide; v++) {
            if (v * kLanes % kLine == 0) __builtin_prefetch(from + kRightAhead * stride + v * kLanes, 0, 2);
            const Vec x = load_some(from + v * kLanes, int(limited(columns - v * kLanes)));
            store(to.at(column + v * kLanes) + k * kPanel, x);
            sizes[v].add(x);
        }
    for (int v = 0; v < kWide; v++) to.finish(column + v * kLanes, sizes[v]);
}

// The same where columns of the right matrix are rows in memory; one vector of them.
template <class Way>
static void copy_transposed(const float* from, int64_t stride, int64_t depth, int64_t column, int64_t columns,
                            const typename Way::Right& to) {
    typename Way::Sizes sizes;
    float* const data = to.at(column);
    for (int64_t k = 0; k < depth; k += kLanes) {
        Vec v[kLanes];
        for (int64_t r = 0; r < kLanes; r++) __builtin_prefetch(from + r * stride + k + 4 * kLanes, 0, 2);
        load_transposed(from + k, stride, limited(columns), limited(depth - k), v);
        for (int64_t i = 0; i < limited(depth - k); i++) store(data + (k + i) * kPanel, v[i]), sizes.add(v[i]);
    }
    to.finish(column, sizes);
}

// Groups of columns of the right matrix from `group` on, at most kTogether.
template <class Way>
static void copy_groups(const rk_matrix& m, Span depth, int64_t group, int64_t groups, int64_t columns,
                        const typename Way::Right& to) {
    const int64_t column = group * kGroup, size = depth.size();
    const float* const from = m.data + (m.transposed ? column * m.stride + depth.begin : depth.begin * m.stride + column);
    if (m.transposed)
        for (int64_t c = 0; c < groups * kGroup; c += kLanes)
            copy_transposed<Way>(from + c * m.stride, m.stride, size, column + c, columns - column - c, to);
    else if (groups == kTogether)
        copy_columns<Way, kTogether>(from, m.stride, size, column, columns - column, to);
    else
        copy_columns<Way, 1>(from, m.stride, size, column, columns - column, to);
}

// Some rows of the left matrix, a part of the depth.
template <class Left>
static void copy_rows(const rk_matrix& m, Span rows, Span depth, const Left& to) {
    if (!m.transposed) {
        const float* from = m.data + rows.begin * m.stride + depth.begin;
        for (int64_t r = 0; r < rows.size(); r++, from += m.stride) {
            if (r + kLeftAhead < rows.size())
                for (int64_t k = 0; k < depth.size(); k += kLine) __builtin_prefetch(from + kLeftAhead * m.stride + k);
            to.copy(r, from);
        }
        return;
    }
    for (int64_t k = 0; k < depth.size(); k += kLanes)
        for (int64_t r = 0; r < rows.size(); r += kLanes) {
            Vec v[kLanes];
            load_transposed(m.data + (depth.begin + k) * m.stride + rows.begin + r, m.stride, limited(depth.size() - k),
                            limited(rows.size() - r), v);
            for (int64_t i = 0; i < limited(rows.size() - r); i++) store(to.at(r + i, k), v[i]);
        }
    for (int64_t r = 0; r < rows.size(); r++) to.finish(r);
}

// Parts of the rows, parts of the depth, columns of whole groups, and what the workspace holds: for each thread its rows, then
// the copy of the right matrix, a part of the depth after the other.
struct Plan {
    int64_t parts, depths, columns, own, right, floats;
};
template <class Way>
static Plan plan_of(const MatrixProduct& c) {
    const int64_t depths = depth_parts(c.depth), columns = ceil_div(c.columns, kGroup) * kGroup;
    const int64_t parts = ceil_div(ceil_div(c.rows, Way::kMostRows), c.threads) * c.threads, rows = ceil_div(c.rows, parts);
    const int64_t depth = smaller(c.depth, kPart);
    const int64_t own = ceil_div(Way::Left::floats(rows, depth), kLine) * kLine, right = Way::Right::floats(columns, depth);
    return {parts, depths, columns, own, right, c.threads * own + depths * right};
}

template <class Way>
static void multiply(const MatrixProduct& c, float* output, float* workspace) {
    const Plan plan = plan_of<Way>(c);
    const int64_t groups = plan.columns / kGroup;
    const auto right_at = [&](int64_t d) {
        float* const memory = workspace + c.threads * plan.own + d * plan.right;
        return typename Way::Right(memory, plan.columns, depth_part(c.depth, d).size());
    };
#pragma omp parallel num_threads(c.threads)
    {
        float* const own = workspace + omp_get_thread_num() * plan.own;
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t d = 0; d < plan.depths; d++)
            for (int64_t group = 0; group < groups; group += kTogether)
                copy_groups<Way>(*c.right, depth_part(c.depth, d), group, smaller(kTogether, groups - group), c.columns,
                                 right_at(d));
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < plan.parts; i++) {
            const Span rows = part(c.rows, plan.parts, i);
            for (int64_t d = 0; d < plan.depths; d++) {
                const Span depth = depth_part(c.depth, d);
                const typename Way::Left left(own, rows.size(), depth.size());
                copy_rows(*c.left, rows, depth, left);
                Product p = {};
                right_at(d).describe(p);
                p.output = output + rows.begin * c.columns;
                p.residual = d ? p.output : nullptr;
                p.depth = p.weight_depth = depth.size();
                p.columns = p.output_stride = c.columns;
                for (int64_t group = 0; group < groups; group++) left.multiply(p, group, (group + 1) % groups);
            }
        }
    }
}

}  // namespace matmul
}  // namespace RK_ISA

// Products of float32 matrices by pairs (channel_pairs.h), for training, whose weights change with each step.
//
// Both matrices are copied, a part of the depth after the other: rows of the left one and columns of the right one, each
// scaled by a power of two to the size of one. Each element is a sum in the order of the depth, whatever the number of threads.
#pragma once

#include "channel_pairs.h"
#include "matrix.h"

namespace RK_ISA {
namespace matmul {

using namespace pointwise;

constexpr int64_t kMostRows = 208;  // that a thread takes on: their copies stay in the second level cache

// How large columns are, from their sums of squares and largest numbers.
struct Sizes {
    Vec squares = {}, largest = {};
    RK_INLINE void add(Vec v) { add_size(v, squares, largest); }
};

// A vector of columns of the right matrix: where their copy is, and how many of them there are.
static RK_INLINE float* column_at(float* groups, int64_t depth, int64_t column) {
    return groups + column / kPanel * depth * kPanel + column % kPanel;
}

constexpr int64_t kFetchedAhead = 16;  // rows of the right matrix

// Some groups of columns of the right matrix, of which `columns` are left.
template <int kGroups>
static void copy_columns(const float* from, int64_t stride, int64_t depth, int64_t columns, float* to, Sizes* sizes) {
    constexpr int kWide = kGroups * kGroup / kLanes;
    Sizes size[kWide];
    for (int64_t k = 0; k < depth; k++, from += stride)
#pragma GCC unroll 8
        for (int v = 0; v < kWide; v++) {
            __builtin_prefetch(from + kFetchedAhead * stride + v * kLanes, 0, 2);
            const Vec x = load_some(from + v * kLanes, int(limited(columns - v * kLanes)));
            store(column_at(to, depth, v * kLanes) + k * kPanel, x);
            size[v].add(x);
        }
    for (int v = 0; v < kWide; v++) sizes[v] = size[v];
}

// The same where columns of the right matrix are rows in memory; one vector of them.
static void copy_transposed(const float* from, int64_t stride, int64_t depth, int64_t columns, float* to, Sizes& sizes) {
    Sizes size;
    for (int64_t k = 0; k < depth; k += kLanes) {
        Vec v[kLanes];
        for (int64_t r = 0; r < kLanes; r++) __builtin_prefetch(from + r * stride + k + 4 * kLanes, 0, 2);
        load_transposed(from + k, stride, limited(columns), limited(depth - k), v);
        for (int64_t i = 0; i < limited(depth - k); i++) store(to + (k + i) * kPanel, v[i]), size.add(v[i]);
    }
    sizes = size;
}

// Scales a copied vector of columns, and sums up what its pairs add.
static void scale_columns(float* w, int64_t depth, const Sizes& sizes, float* scales, float* pair_sums) {
    Vec scale, sum = {};
    for (int lane = 0; lane < kLanes; lane++) {
        scale[lane] = power_of_two(1 / size_of(sizes.squares[lane], sizes.largest[lane], depth));
        scales[lane] = 1 / scale[lane];
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
    store(pair_sums, sum);
}

constexpr int64_t kTogether = 2;  // groups that are copied side by side: longer pieces of each row

// Groups of columns of the right matrix from `first` on, at most kTogether: copied, scaled, and what their pairs add.
static void copy_groups(const rk_matrix& m, Span depth, int64_t first, int64_t groups, int64_t columns, float* to,
                        float* scales, float* pair_sums) {
    const int64_t column = first * kGroup, size = depth.size();
    Sizes sizes[kTogether * kGroup / kLanes];
    const float* const from = m.data + (m.transposed ? column * m.stride + depth.begin : depth.begin * m.stride + column);
    if (m.transposed)
        for (int64_t c = 0; c < groups * kGroup; c += kLanes)
            copy_transposed(from + c * m.stride, m.stride, size, columns - column - c, column_at(to, size, c), sizes[c / kLanes]);
    else if (groups == kTogether)
        copy_columns<kTogether>(from, m.stride, size, columns - column, to, sizes);
    else
        copy_columns<1>(from, m.stride, size, columns - column, to, sizes);
    for (int64_t c = 0; c < groups * kGroup; c += kLanes)
        scale_columns(column_at(to, size, c), size, sizes[c / kLanes], scales + c, pair_sums + c);
}

// Some rows of the left matrix, a part of the depth.
static void copy_rows(const rk_matrix& m, Span rows, Span depth, const PairedRows& to) {
    if (!m.transposed) return scale_rows(m.data + rows.begin * m.stride + depth.begin, m.stride, depth.size(), nullptr, to);
    for (int64_t k = 0; k < depth.size(); k += kLanes)
        for (int64_t r = 0; r < rows.size(); r += kLanes) {
            Vec v[kLanes];
            load_transposed(m.data + (depth.begin + k) * m.stride + rows.begin + r, m.stride, limited(depth.size() - k),
                            limited(rows.size() - r), v);
            for (int64_t i = 0; i < limited(rows.size() - r); i++) store(to.at(k / kDepth, r + i) + k % kDepth, v[i]);
        }
    for (int64_t r = 0; r < rows.size(); r++)
        scale_row(to.at(0, r), to.count * PairedRows::kStride, depth.size(), nullptr, to, r);
}

// Parts of the rows, parts of the depth, groups of columns, and what the workspace holds: for each thread its rows, then
// the scales, the sums of pairs and the copy of the right matrix, each a part of the depth after the other.
struct Plan {
    int64_t parts, depths, groups, own, floats;
    int64_t of_group(int64_t depth, int64_t group) const { return (depth * groups + group) * kGroup; }
};
static Plan plan_of(const MatrixProduct& c) {
    const int64_t depths = scaled_parts(c.depth), groups = ceil_div(c.columns, kGroup);
    const int64_t parts = ceil_div(ceil_div(c.rows, kMostRows), c.threads) * c.threads, rows = ceil_div(c.rows, parts);
    const int64_t own = PairedRows::floats(rows, smaller(c.depth, kScaled));
    return {parts, depths, groups, own, c.threads * own + groups * kGroup * (c.depth + 2 * depths)};
}

static size_t workspace_bytes(const MatrixProduct& c) { return plan_of(c).floats * sizeof(float); }

static void run(const MatrixProduct& c, float* output, float* workspace) {
    const Plan plan = plan_of(c);
    float* const scales = workspace + c.threads * plan.own;
    float* const pair_sums = scales + plan.of_group(plan.depths, 0);
    float* const right = pair_sums + plan.of_group(plan.depths, 0);
    const auto packed = [&](int64_t depth) { return right + depth * kScaled * plan.groups * kGroup; };
#pragma omp parallel num_threads(c.threads)
    {
        float* const own = workspace + omp_get_thread_num() * plan.own;
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t d = 0; d < plan.depths; d++)
            for (int64_t group = 0; group < plan.groups; group += kTogether) {
                const Span depth = scaled_part(c.depth, d);
                const int64_t of_group = plan.of_group(d, group);
                copy_groups(*c.right, depth, group, smaller(kTogether, plan.groups - group), c.columns,
                            packed(d) + group * kGroup * depth.size(), scales + of_group, pair_sums + of_group);
            }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < plan.parts; i++) {
            const Span rows = part(c.rows, plan.parts, i);
            for (int64_t d = 0; d < plan.depths; d++) {
                const Span depth = scaled_part(c.depth, d);
                const PairedRows left(own, rows.size(), depth.size());
                copy_rows(*c.left, rows, depth, left);
                Product p = {};
                p.packed = packed(d);
                p.output_sizes = scales + plan.of_group(d, 0);
                p.pair_sums = pair_sums + plan.of_group(d, 0);
                p.output = output + rows.begin * c.columns;
                p.residual = d ? p.output : nullptr;
                p.depth = p.weight_depth = depth.size();
                p.columns = p.output_stride = c.columns;
                for (int64_t group = 0; group < plan.groups; group++)
                    multiply_group(p, {left, 0, {0, p.depth}}, {0, rows.size()}, group,
                                   weights_of(p, (group + 1) % plan.groups, {0, p.depth}), nullptr);
            }
        }
    }
}

}  // namespace matmul
}  // namespace RK_ISA

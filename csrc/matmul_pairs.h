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

// `columns` of the group have something in them.
static void copy_group(const rk_matrix& m, Span depth, int64_t group, int64_t columns, float* to) {
    for (int64_t c = 0; c < kGroup; c += kLanes) {
        const int64_t width = limited(columns - c);
        float* const panel = to + c / kPanel * depth.size() * kPanel + c % kPanel;
        if (!m.transposed) {
            const float* from = m.data + depth.begin * m.stride + group * kGroup + c;
            for (int64_t k = 0; k < depth.size(); k++, from += m.stride)
                store(panel + k * kPanel, width ? load_some(from, int(width)) : Vec{});
            continue;
        }
        for (int64_t k = 0; k < depth.size(); k += kLanes) {
            Vec v[kLanes];
            load_transposed(m.data + (group * kGroup + c) * m.stride + depth.begin + k, m.stride, width,
                            limited(depth.size() - k), v);
            for (int64_t i = 0; i < limited(depth.size() - k); i++) store(panel + (k + i) * kPanel, v[i]);
        }
    }
}

static void scale_columns(float* group, int64_t depth, float* scales) {
    for (int64_t c = 0; c < kGroup; c += kLanes) {
        float* const panel = group + c / kPanel * depth * kPanel + c % kPanel;
        Vec squares = {}, largest = {};
        for (int64_t k = 0; k < depth; k++) add_size(load(panel + k * kPanel), squares, largest);
        Vec scale;
        for (int lane = 0; lane < kLanes; lane++) {
            scale[lane] = power_of_two(1 / size_of(squares[lane], largest[lane], depth));
            scales[c + lane] = 1 / scale[lane];
        }
        for (int64_t k = 0; k < depth; k++) store(panel + k * kPanel, load(panel + k * kPanel) * scale);
    }
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
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < plan.depths * plan.groups; i++) {
            const Span depth = scaled_part(c.depth, i / plan.groups);
            const int64_t group = i % plan.groups;
            float* const to = packed(i / plan.groups) + group * kGroup * depth.size();
            copy_group(*c.right, depth, group, c.columns - group * kGroup, to);
            scale_columns(to, depth.size(), scales + plan.of_group(i / plan.groups, group));
            sum_pairs({to, depth.size() * kPanel}, depth.size(), pair_sums + plan.of_group(i / plan.groups, group));
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

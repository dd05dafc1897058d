// Weight gradient of the direct algorithm: filters, or some of their rows, in parallel; images one after the other.
//
// Workspace of one thread: two packed filters for each group of channels that shares a cache line, a tile of the output
// gradient and one of the input, of kTileBytes (more when a few rows need more).
#pragma once

#include <omp.h>

#include "direct_plan.h"

namespace RK_ISA {
namespace direct {

// The weight gradient is a correlation of the input with the output gradient as its filter.
struct WeightPlan {
    Axes a;
    Tiling tiling;               // of the output gradient
    int64_t taps_h, taps_w;      // of the largest phase
    int64_t blocks, block_rows;  // of rows of the filter, computed by different threads
};

static WeightPlan weight_plan(const rk_problem& p) {
    WeightPlan plan;
    plan.a = axes(p);
    const int64_t split_h = plan.a.h.dilation, split_w = plan.a.w.dilation;
    plan.taps_h = divide_up(p.kernel_h, plan.a.h.stride);
    plan.taps_w = divide_up(p.kernel_w, plan.a.w.stride);
    plan.tiling = tile(divide_up(p.out_h, split_h), divide_up(p.out_w, split_w), plan.taps_h, plan.taps_w,
                       p.out_h, kMinJobs);
    const int64_t units = group_count(p.channels) * plan.a.h.stride * plan.a.w.stride;
    // blocks of rows pack the same tiles again
    const bool even = units >= 2 * p.threads || units % p.threads == 0;
    const int64_t wanted = even ? 1 : divide_up(2 * p.threads, units);
    plan.block_rows = divide_up(plan.taps_h, at_most(wanted, plan.taps_h));
    plan.blocks = divide_up(plan.taps_h, plan.block_rows);
    return plan;
}

struct WeightFloats {
    int64_t filter, gradient, x;
};

static WeightFloats weight_floats(const WeightPlan& plan) {
    const Tiling& t = plan.tiling;
    return {plan.block_rows * plan.taps_w * kLanes, tile_floats(t.rows, t.cols),
            tile_floats(t.rows + plan.block_rows - 1, t.cols + plan.taps_w - 1)};
}

constexpr int64_t kMostTogether = kLine / kLanes;

// Groups whose channels share cache lines go through each image one after the other, if enough are left for the threads.
static int64_t groups_together(const rk_problem& p) {
    const int64_t in_line = p.dtype == RK_F32 && p.input_stride[1] == 1 ? kMostTogether : 1;
    return group_count(p.channels) >= 2 * p.threads * in_line ? in_line : 1;
}

static size_t weight_workspace(const rk_problem& p) {
    const WeightFloats f = weight_floats(weight_plan(p));
    return (2 * groups_together(p) * f.filter + f.gradient + f.x) * sizeof(float);
}

// Sums in two levels: of about this many products, and of those.
constexpr int64_t kProductsPerLevel = 4096;

struct Sums {
    float *total, *partial;
    int64_t floats, products;  // of the partial sum, how many are in it

    void flush() {
        for (int64_t i = 0; products && i < floats; i += kLanes) store(total + i, load(total + i) + load(partial + i));
        products = 0;
    }
};

// Adds one image's gradient of the taps [begin, begin + rows) of a phase.
static void add_image_gradient(const Call& call, const WeightPlan& plan, int64_t n, int64_t group, int64_t stride_h,
                               int64_t stride_w, int64_t begin, int64_t rows, float* gradient, float* tile_of_x,
                               Sums& sums) {
    const rk_problem& p = *call.problem;
    const Image x_all =
        group_image(call.input, p.input_stride, p.in_h, p.in_w, p.channels, p.dtype, n, group);
    const Image g_all =
        group_image(call.output, p.output_stride, p.out_h, p.out_w, p.channels, p.dtype, n, group);
    Correlation c = {};
    c.split_taps = true;
    for (int64_t i = 0; i < plan.a.h.dilation; i++)
        for (int64_t j = 0; j < plan.a.w.dilation; j++) {
            const Phase h = phase(plan.a.h, stride_h + i), w = phase(plan.a.w, stride_w + j);
            const Image x = lattice_of(x_all, h.input, w.input), g = lattice_of(g_all, h.output, w.output);
            for (int64_t row = 0; row < g.rows; row += plan.tiling.rows)
                for (int64_t col = 0; col < g.cols; col += plan.tiling.cols) {
                    const int64_t g_rows = at_most(plan.tiling.rows, g.rows - row);
                    const int64_t g_cols = at_most(plan.tiling.cols, g.cols - col);
                    const Reach rh = reach(row + begin, g_rows, rows, h.pad, x.rows);
                    const Reach rw = reach(col, g_cols, w.taps.count, w.pad, x.cols);
                    read_tile(g, row, col, g_rows, g_cols, gradient, pitch_of(g_cols));
                    read_tile(x, rh.begin, rw.begin, rh.count, rw.count, tile_of_x, pitch_of(rw.count));
                    c.x = tile_of_x;
                    c.x_pitch = pitch_of(rw.count);
                    c.x_step = kLanes;
                    c.x_rows = int(rh.count);
                    c.x_cols = int(rw.count);
                    c.w = gradient;
                    c.w_pitch = pitch_of(g_cols);
                    c.w_step = kLanes;
                    c.kernel_rows = int(g_rows);
                    c.kernel_cols = int(g_cols);
                    c.pad_top = int(rh.pad);
                    c.pad_left = int(rw.pad);
                    c.y = sums.partial;
                    c.y_pitch = w.taps.count * kLanes;
                    c.y_step = kLanes;
                    c.y_rows = int(rows);
                    c.y_cols = int(w.taps.count);
                    c.add = sums.products > 0;
                    correlate(c);
                    sums.products += g_rows * g_cols;
                    if (sums.products >= kProductsPerLevel) sums.flush();
                }
        }
}

static void run_weight_gradient(const Call& call) {
    const rk_problem& p = *call.problem;
    const WeightPlan plan = weight_plan(p);
    const WeightFloats floats = weight_floats(plan);
    const int64_t phases_h = plan.a.h.stride, phases_w = plan.a.w.stride;
    const int64_t groups = group_count(p.channels), together = groups_together(p);
    const int64_t jobs = divide_up(groups, together) * phases_h * phases_w * plan.blocks;
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float* const totals = reinterpret_cast<float*>(call.workspace + thread * call.workspace_stride);
        float* const gradient = totals + 2 * together * floats.filter;
        float* const x = gradient + floats.gradient;
        for (int64_t i = jobs * thread / threads; i < jobs * (thread + 1) / threads; i++) {
            const int64_t begin = i % plan.blocks * plan.block_rows, unit = i / plan.blocks;
            const int64_t stride_w = unit % phases_w, stride_h = unit / phases_w % phases_h;
            const int64_t first = unit / phases_w / phases_h * together, count = at_most(together, groups - first);
            const auto weight = [&](int64_t g) {
                return lattice_of(filter_image(p, call.weight, first + g), phase(plan.a.h, stride_h).taps,
                                  phase(plan.a.w, stride_w).taps);
            };
            const int64_t rows = at_most(plan.block_rows, weight(0).rows - begin), cols = weight(0).cols;
            if (rows <= 0 || !cols) continue;
            clear(totals, together * floats.filter / kLanes);
            Sums sums[kMostTogether];
            for (int64_t g = 0; g < count; g++) {
                float* const total = totals + g * floats.filter;
                sums[g] = {total, total + together * floats.filter, rows * cols * kLanes, 0};
            }
            for (int64_t n = 0; n < p.batch; n++)
                for (int64_t g = 0; g < count; g++)
                    add_image_gradient(call, plan, n, first + g, stride_h, stride_w, begin, rows, gradient, x, sums[g]);
            for (int64_t g = 0; g < count; g++) {
                sums[g].flush();
                write_tile(weight(g), begin, 0, rows, cols, sums[g].total, cols * kLanes, Vec{}, false);
            }
        }
    }
}

}  // namespace direct
}  // namespace RK_ISA

// Weight gradient of 3x3 filters where channels are adjacent (NHWC): the nine sums of a group of channels are in
// registers while a strip of columns runs down the map, so that every number of the output gradient is loaded once and
// of the input little more than once.
//
// The tensors are read in place, and all groups of channels go down a strip before the next strip: the pages of memory in
// use are few. Few groups leave work for all threads by going through parts of the images, whose sums are added up
// at the end.
//
// Sums in three levels, as long ones lose digits: of a strip, of a tile and of the images.
//
// Workspace of one thread: its share of the sums.
#pragma once

#include <omp.h>

#include "direct_pixels.h"

namespace RK_ISA {
namespace direct {

constexpr int kNine = 9;
constexpr int64_t kNineFloats = kNine * kLanes;
constexpr int kStripColumns = kSums > 14 ? 6 : 2;  // of which the output gradients of three rows are in registers
constexpr int64_t kStripRows = 32;                 // at most
constexpr int kRowsAhead = 6;                      // from the row in use to the one that is fetched
constexpr int64_t kNineJobs = 16;                  // at least; a constant, so that results do not depend on threads

// A tile of the output gradient, and of the input what it meets: pixel (0, 0) of the gradient reaches x from row
// -pad_top and column -pad_left on.
struct Window {
    const float *x, *g;
    int64_t x_pitch, x_step, g_pitch, g_step;
    int x_rows, x_cols, g_rows, g_cols, pad_top, pad_left;
    bool fetch;
};

template <int Count>
static RK_INLINE void fetch_pixels(const float* pixel, int64_t step) {
#pragma GCC unroll 8
    for (int i = 0; i < Count; i++) __builtin_prefetch(pixel + i * step + kLine - 1, 0, 2);
}

// Adds a row of x, from column `left` on, times the output gradients g[k] of the rows that it meets by row k of the
// taps. Edge: some columns do not exist. Border: nor do rows of gradients but those from `first` to `last`.
template <bool Edge, bool Border, int T>
static RK_INLINE void add_products(const Window& s, const float* x, int left, const Vec (&g)[3][T], int first, int last,
                                   Vec (&sum)[kNine]) {
#pragma GCC unroll 16
    for (int j = 0; j < T + 2; j++) {
        if (Edge && (left + j < 0 || left + j >= s.x_cols)) continue;
        const Vec v = load(x + j * s.x_step);
#pragma GCC unroll 4
        for (int k = 0; k < 3; k++) {
            if (Border && (k < first || k > last)) continue;
#pragma GCC unroll 4
            for (int l = 0; l < 3; l++)
                if (j - l >= 0 && j - l < T) sum[3 * k + l] += g[k][j - l] * v;
        }
    }
}

// Adds the products of T columns of the output gradient from `col` on to the nine sums at `total`.
template <bool Edge, int T>
static void sum_columns(const Window& s, int col, float* total) {
    const int left = col - s.pad_left;
    const float* x = s.x - s.pad_top * s.x_pitch + left * s.x_step;
    const float* gradient = s.g + col * s.g_step;
    Vec sum[kNine] = {}, g[3][T] = {};
    for (int i = 0; i < s.g_rows + 2; i++, x += s.x_pitch, gradient += s.g_pitch) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            g[2][t] = g[1][t];
            g[1][t] = g[0][t];
            if (i < s.g_rows) g[0][t] = load(gradient + t * s.g_step);
        }
        if (s.fetch) {
            fetch_pixels<T + 2>(x + kRowsAhead * s.x_pitch, s.x_step);
            fetch_pixels<T>(gradient + kRowsAhead * s.g_pitch, s.g_step);
        }
        const int row = i - s.pad_top;
        if (row < 0 || row >= s.x_rows) continue;
        if (i >= 2 && i < s.g_rows)
            add_products<Edge, false>(s, x, left, g, 0, 2, sum);
        else
            add_products<Edge, true>(s, x, left, g, i - s.g_rows + 1, i, sum);
    }
#pragma GCC unroll 16
    for (int tap = 0; tap < kNine; tap++) store(total + tap * kLanes, load(total + tap * kLanes) + sum[tap]);
}

typedef void (*ColumnsKernel)(const Window&, int col, float* total);

template <int T>
static constexpr ColumnsKernel columns_kernel(bool edge) {
    if constexpr (T <= kStripColumns)
        return edge ? sum_columns<true, T> : sum_columns<false, T>;
    else
        return nullptr;
}

static void add_columns(const Window& s, int col, int width, float* total) {
    static constexpr ColumnsKernel kernels[2][6] = {
        {columns_kernel<1>(false), columns_kernel<2>(false), columns_kernel<3>(false), columns_kernel<4>(false),
         columns_kernel<5>(false), columns_kernel<6>(false)},
        {columns_kernel<1>(true), columns_kernel<2>(true), columns_kernel<3>(true), columns_kernel<4>(true),
         columns_kernel<5>(true), columns_kernel<6>(true)}};
    const bool edge = col < s.pad_left || col - s.pad_left + width + 2 > s.x_cols;
    kernels[edge][width - 1](s, col, total);
}

static bool suits_nine(const rk_problem& p) {
    return p.pass == RK_GRAD_WEIGHT && p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1 &&
           p.dilation_h == 1 && p.dilation_w == 1 && p.dtype == RK_F32 && p.input_stride[1] == 1 &&
           p.output_stride[1] == 1 && p.channels >= kLanes;
}

struct NinePlan {
    Tiling tiling;          // of the output gradient
    int64_t groups, parts;  // parts of the images, each with sums of its own
    int64_t own_sums;       // in the workspace of each thread
};

static NinePlan nine_plan(const rk_problem& p) {
    NinePlan plan;
    plan.groups = group_count(p.channels);
    plan.tiling = tile(p.out_h, p.out_w, 3, 3, kStripRows, at_least(1, p.batch) * plan.groups);
    const int64_t tiles = p.batch * plan.tiling.row_tiles * plan.tiling.col_tiles;
    plan.parts = at_least(1, at_most(tiles, divide_up(kNineJobs, plan.groups)));
    plan.own_sums = divide_up(plan.parts * plan.groups, p.threads);
    return plan;
}

static size_t nine_workspace(const rk_problem& p) {
    return nine_plan(p).own_sums * 2 * kNineFloats * sizeof(float);
}

// The sums of a part for a group, and after them those of the tile it is at.
static float* nine_sums(const Call& call, const NinePlan& plan, int64_t part, int64_t group) {
    const int64_t index = part * plan.groups + group, threads = call.problem->threads;
    return reinterpret_cast<float*>(call.workspace + index % threads * call.workspace_stride) +
           index / threads * 2 * kNineFloats;
}

// A tile of the output gradient of one image.
struct NineTile {
    int64_t n, row, col, rows, cols;
};

static NineTile nine_tile(const rk_problem& p, const Tiling& t, int64_t index) {
    const int64_t col = index % t.col_tiles * t.cols, row = index / t.col_tiles % t.row_tiles * t.rows;
    return {index / t.col_tiles / t.row_tiles, row, col, at_most(t.rows, p.out_h - row), at_most(t.cols, p.out_w - col)};
}

static Window window(const Call& call, const NineTile& t, int64_t group) {
    const rk_problem& p = *call.problem;
    const int64_t first = first_channel(p.channels, group);
    Window s;
    s.x = static_cast<const float*>(call.input) + t.n * p.input_stride[0] + first;
    s.g = static_cast<const float*>(call.output) + t.n * p.output_stride[0] + first + t.row * p.output_stride[2] +
          t.col * p.output_stride[3];
    s.x_pitch = p.input_stride[2];
    s.x_step = p.input_stride[3];
    s.g_pitch = p.output_stride[2];
    s.g_step = p.output_stride[3];
    s.x_rows = int(p.in_h);
    s.x_cols = int(p.in_w);
    s.g_rows = int(t.rows);
    s.g_cols = int(t.cols);
    s.pad_top = int(p.pad_top - t.row);
    s.pad_left = int(p.pad_left - t.col);
    s.fetch = outgrows_caches(p) && group % (kLine / kLanes) == 0;
    return s;
}

static void add_nine(float* to, const float* sums) {
    for (int64_t i = 0; i < kNineFloats; i += kLanes) store(to + i, load(to + i) + load(sums + i));
}

// Adds the sums of a tile for the groups from `begin` to before `end` of a part.
static void add_tile(const Call& call, const NinePlan& plan, int64_t part, const NineTile& t, int64_t begin, int64_t end) {
    const Split columns(int(t.cols), kStripColumns);
    const auto sums = [&](int64_t group) { return nine_sums(call, plan, part, group) + kNineFloats; };
    for (int i = 0; i < columns.parts; i++)
        for (int64_t group = begin; group < end; group++)
            add_columns(window(call, t, group), columns.begin(i), columns.end(i) - columns.begin(i), sums(group));
    for (int64_t group = begin; group < end; group++) {
        add_nine(sums(group) - kNineFloats, sums(group));
        clear(sums(group), kNine);
    }
}

// Adds up what the parts found for a group, and writes it.
static void write_nine(const Call& call, const NinePlan& plan, int64_t group) {
    const rk_problem& p = *call.problem;
    float* const total = nine_sums(call, plan, 0, group);
    for (int64_t part = 1; part < plan.parts; part++) add_nine(total, nine_sums(call, plan, part, group));
    const int64_t first = first_channel(p.channels, group), end = at_most(p.channels, (group + 1) * kLanes);
    for (int64_t channel = group * kLanes; channel < end; channel++)
        for (int64_t tap = 0; tap < kNine; tap++)
            call.weight[channel * kNine + tap] = total[tap * kLanes + channel - first];
}

static void run_nine(const Call& call) {
    const rk_problem& p = *call.problem;
    const NinePlan plan = nine_plan(p);
    const int64_t groups = plan.groups, jobs = plan.parts * groups;
    const int64_t tiles = p.batch * plan.tiling.row_tiles * plan.tiling.col_tiles;
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t i = thread; i < jobs; i += threads) clear(nine_sums(call, plan, i / groups, i % groups), 2 * kNine);
#pragma omp barrier
        const int64_t first = jobs * thread / threads, end = jobs * (thread + 1) / threads;
        for (int64_t part = first / groups; part * groups < end; part++)
            for (int64_t i = tiles * part / plan.parts; i < tiles * (part + 1) / plan.parts; i++)
                add_tile(call, plan, part, nine_tile(p, plan.tiling, i), at_least(0, first - part * groups),
                         at_most(groups, end - part * groups));
#pragma omp barrier
        for (int64_t group = thread; group < groups; group += threads) write_nine(call, plan, group);
    }
}

}  // namespace direct
}  // namespace RK_ISA

// The direct algorithm: every pass as correlations of tiles, see direct_tile.h.
//
// Workspace of one thread: a packed filter, an input tile of kTileBytes (more when a single row of outputs needs
// more), and an output tile no larger; for the weight gradient one more tile and two packed filters.
//
// Infinities and NaNs of the input stay within their receptive fields: products with padding are never formed.
#pragma once

#include <omp.h>

#include "direct_tile.h"
#include "kernels.h"
#include "phase.h"

namespace RK_ISA {
namespace direct_passes {

constexpr int64_t kTileBytes = 192 << 10;
constexpr int64_t kTileCols = 280;
constexpr int64_t kMinJobs = 32;  // a constant, so that results do not depend on the number of threads
constexpr int64_t kPixel = kLanes * sizeof(float);

struct Tiling {
    int64_t rows, cols;              // of the tile in its sub-lattice
    int64_t row_tiles, col_tiles;
};

static int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t pitch_of(int64_t cols) { return (cols | 1) * kLanes; }  // rows fall in different cache sets

// Splits rows x cols evenly into tiles whose halo of taps_h x taps_w fits the budget.
static Tiling tile(int64_t rows, int64_t cols, int64_t taps_h, int64_t taps_w, int64_t jobs_per_tile) {
    Tiling t;
    t.col_tiles = divide_up(cols, kTileCols);
    t.cols = divide_up(cols, t.col_tiles);
    const int64_t fit = kTileBytes / (pitch_of(t.cols + taps_w - 1) * int64_t(sizeof(float))) - (taps_h - 1);
    t.row_tiles = divide_up(rows, at_least(fit, at_least(4, taps_h / 2)));
    const int64_t wanted = divide_up(kMinJobs, jobs_per_tile * t.col_tiles);
    t.row_tiles = at_least(t.row_tiles, at_most(wanted, rows / at_least(8, taps_h)));
    t.row_tiles = at_least(1, t.row_tiles);
    t.rows = divide_up(rows, t.row_tiles);
    t.row_tiles = divide_up(rows, t.rows);
    return t;
}

struct Axes {
    Axis h, w;
};

static Axes axes(const rk_problem& p) {
    return {{p.in_h, p.out_h, p.kernel_h, p.stride_h, p.dilation_h, p.pad_top},
            {p.in_w, p.out_w, p.kernel_w, p.stride_w, p.dilation_w, p.pad_left}};
}

static Image lattice_of(Image image, const Lattice& h, const Lattice& w) {
    image.data += (h.first * image.h + w.first * image.w) * (image.dtype == RK_F32 ? 4 : 2);
    image.h *= h.step;
    image.w *= w.step;
    image.rows = h.count;
    image.cols = w.count;
    return image;
}

// The filters of a group as an image, one "pixel" for each tap.
static Image filter_image(const rk_problem& p, const float* weight, int64_t group) {
    const int64_t taps = int64_t(p.kernel_h) * p.kernel_w, stride[4] = {0, taps, p.kernel_w, 1};
    return group_image(const_cast<float*>(weight), stride, p.kernel_h, p.kernel_w, p.channels, RK_F32, 0, group);
}

struct Buffers {
    const float* filter;
    float *x, *y, *sum;
};

static int64_t filter_floats(const rk_problem& p) { return int64_t(p.kernel_h) * p.kernel_w * kLanes; }
static int64_t tile_floats(int64_t rows, int64_t cols) { return rows * pitch_of(cols); }

// Part of an axis that a tile of outputs reads.
struct Reach {
    int64_t begin, count, pad;  // pad: of the tile with respect to `begin`
};

static Reach reach(int64_t begin, int64_t count, int64_t taps, int64_t pad, int64_t size) {
    const int64_t first = at_least(0, begin - pad), end = at_most(size, begin + count - 1 + taps - pad);
    return {first, at_least(0, end - first), first - begin + pad};
}

// ---------------------------------------------------------------- forward and input gradient

// An input gradient is a forward pass from the output gradient, with flipped filters.
struct Source {
    const rk_problem* problem;
    bool flipped;
    void *x, *y;
    const int64_t *x_stride, *y_stride;
    int64_t x_rows, x_cols, y_rows, y_cols;
    int64_t phases_h, phases_w, sums_h, sums_w;  // phases with outputs of their own, and phases that add up
    Tiling tiling;
};

static Source source(const Call& call) {
    const rk_problem& p = *call.problem;
    const Axes a = axes(p);
    Source s;
    s.problem = &p;
    s.flipped = p.pass == RK_GRAD_INPUT;
    s.x = s.flipped ? call.output : call.input;
    s.y = s.flipped ? call.input : call.output;
    s.x_stride = s.flipped ? p.output_stride : p.input_stride;
    s.y_stride = s.flipped ? p.input_stride : p.output_stride;
    s.x_rows = s.flipped ? p.out_h : p.in_h;
    s.x_cols = s.flipped ? p.out_w : p.in_w;
    s.y_rows = s.flipped ? p.in_h : p.out_h;
    s.y_cols = s.flipped ? p.in_w : p.out_w;
    s.sums_h = s.flipped ? 1 : a.h.stride;
    s.sums_w = s.flipped ? 1 : a.w.stride;
    s.phases_h = phase_count(a.h) / s.sums_h;
    s.phases_w = phase_count(a.w) / s.sums_w;
    s.tiling = tile(divide_up(s.y_rows, s.phases_h), divide_up(s.y_cols, s.phases_w), p.kernel_h, p.kernel_w,
                    p.batch * group_count(p.channels) * s.phases_h * s.phases_w);
    return s;
}

struct Job {
    int64_t n, group, phase_h, phase_w, tile_row, tile_col;
};

static bool is_packed(const Image& image) {
    return image.dtype == RK_F32 && image.c == 1 && image.channels == kLanes;
}

// Filters of few columns use an input too rarely to pay for a packed copy.
static bool readable_in_place(const Image& x, int64_t taps) {
    return is_packed(x) && (taps == 3 || taps == 5 || taps == 7);
}

static void correlate_tile(const Call& call, const Source& s, const Job& job, const Buffers& buffers) {
    const rk_problem& p = *s.problem;
    const Axes a = axes(p);
    const Image x_all = group_image(s.x, s.x_stride, s.x_rows, s.x_cols, p.channels, p.dtype, job.n, job.group);
    const Image y_all = group_image(s.y, s.y_stride, s.y_rows, s.y_cols, p.channels, p.dtype, job.n, job.group);
    const Vec bias = load_channels(call.bias, y_all);
    const Phase h0 = phase(a.h, job.phase_h), w0 = phase(a.w, job.phase_w);
    const Image y = s.flipped ? lattice_of(y_all, h0.input, w0.input) : lattice_of(y_all, h0.output, w0.output);
    const int64_t row = job.tile_row * s.tiling.rows, col = job.tile_col * s.tiling.cols;
    const int64_t rows = at_most(s.tiling.rows, y.rows - row), cols = at_most(s.tiling.cols, y.cols - col);
    if (rows <= 0 || cols <= 0) return;

    const bool in_place = is_packed(y);
    Correlation c;
    c.y = in_place ? reinterpret_cast<float*>(y.data) + row * y.h + col * y.w : buffers.y;
    c.y_pitch = in_place ? y.h : pitch_of(cols);
    c.y_step = in_place ? y.w : kLanes;
    c.y_rows = int(rows);
    c.y_cols = int(cols);
    c.start = in_place ? bias : Vec{};
    c.split_taps = p.kernel_h <= s.x_rows;
    for (int64_t i = 0; i < s.sums_h; i++)
        for (int64_t j = 0; j < s.sums_w; j++) {
            const Phase h = phase(a.h, job.phase_h + i), w = phase(a.w, job.phase_w + j);
            const Image x =
                s.flipped ? lattice_of(x_all, h.output, w.output) : lattice_of(x_all, h.input, w.input);
            const Reach rh = reach(row, rows, h.taps.count, s.flipped ? h.taps.count - 1 - h.pad : h.pad, x.rows);
            const Reach rw = reach(col, cols, w.taps.count, s.flipped ? w.taps.count - 1 - w.pad : w.pad, x.cols);
            if (readable_in_place(x, w.taps.count)) {
                c.x = reinterpret_cast<const float*>(x.data) + rh.begin * x.h + rw.begin * x.w;
                c.x_pitch = x.h;
                c.x_step = x.w;
            } else {
                c.x = buffers.x;
                c.x_pitch = pitch_of(rw.count);
                c.x_step = kLanes;
                read_tile(x, rh.begin, rw.begin, rh.count, rw.count, buffers.x, c.x_pitch);
            }
            c.x_rows = int(rh.count);
            c.x_cols = int(rw.count);
            c.w_step = w.taps.step * kLanes;
            c.w_pitch = h.taps.step * p.kernel_w * kLanes;
            c.w = buffers.filter + h.taps.first * p.kernel_w * kLanes + w.taps.first * kLanes;
            c.kernel_rows = int(h.taps.count);
            c.kernel_cols = int(w.taps.count);
            if (s.flipped) {
                c.w += (h.taps.count - 1) * c.w_pitch + (w.taps.count - 1) * c.w_step;
                c.w_pitch = -c.w_pitch;
                c.w_step = -c.w_step;
            }
            c.pad_top = int(rh.pad);
            c.pad_left = int(rw.pad);
            c.add = i + j > 0;
            c.relu = in_place && p.relu && i == s.sums_h - 1 && j == s.sums_w - 1;
            correlate(c);
        }
    if (!in_place) write_tile(y, row, col, rows, cols, buffers.y, c.y_pitch, bias, p.relu);
}

static size_t tile_workspace(const Source& s) {
    const rk_problem& p = *s.problem;
    const int64_t x = tile_floats(s.tiling.rows + p.kernel_h - 1, s.tiling.cols + p.kernel_w - 1);
    const int64_t y = tile_floats(s.tiling.rows, s.tiling.cols);
    return (filter_floats(p) + x + y) * sizeof(float);
}

static void run_tiles(const Call& call) {
    const rk_problem& p = *call.problem;
    const Source s = source(call);
    const int64_t groups = group_count(p.channels);
    const int64_t parts = s.phases_h * s.phases_w * s.tiling.row_tiles * s.tiling.col_tiles;
    const int64_t jobs = p.batch * parts * groups;
    // small maps: keep a packed filter for all images; large ones: stay within a part of an image
    const bool group_first = s.y_rows * s.y_cols <= 256;
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Buffers buffers;
        float* const filter = reinterpret_cast<float*>(call.workspace + thread * call.workspace_stride);
        buffers.filter = filter;
        buffers.x = filter + filter_floats(p);
        buffers.y = buffers.x + tile_floats(s.tiling.rows + p.kernel_h - 1, s.tiling.cols + p.kernel_w - 1);
        int64_t packed = -1;
        for (int64_t i = jobs * thread / threads; i < jobs * (thread + 1) / threads; i++) {
            Job job;
            int64_t part;
            if (group_first) {
                job.group = i / (p.batch * parts);
                job.n = i / parts % p.batch;
                part = i % parts;
            } else {
                job.n = i / (parts * groups);
                part = i / groups % parts;
                job.group = i % groups;
            }
            job.tile_col = part % s.tiling.col_tiles;
            part /= s.tiling.col_tiles;
            job.tile_row = part % s.tiling.row_tiles;
            part /= s.tiling.row_tiles;
            job.phase_w = part % s.phases_w;
            job.phase_h = part / s.phases_w;
            if (call.spectrum) {
                buffers.filter = static_cast<const float*>(call.spectrum) + job.group * filter_floats(p);
            } else if (packed != job.group) {
                read_tile(filter_image(p, call.weight, job.group), 0, 0, p.kernel_h, p.kernel_w, filter,
                          p.kernel_w * kLanes);
                packed = job.group;
            }
            correlate_tile(call, s, job, buffers);
        }
    }
}

// ---------------------------------------------------------------- weight gradient

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
    plan.tiling = tile(divide_up(p.out_h, split_h), divide_up(p.out_w, split_w), plan.taps_h, plan.taps_w, kMinJobs);
    const int64_t units = group_count(p.channels) * plan.a.h.stride * plan.a.w.stride;
    const int64_t wanted = units >= 2 * p.threads ? 1 : divide_up(2 * p.threads, units);
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

static size_t weight_workspace(const WeightPlan& plan) {
    const WeightFloats f = weight_floats(plan);
    return (2 * f.filter + f.gradient + f.x) * sizeof(float);
}

// Adds one image's gradient of the taps [begin, begin + rows) of a phase to buffers.y, or stores it there.
static void add_image_gradient(const Call& call, const WeightPlan& plan, int64_t n, int64_t group, int64_t stride_h,
                               int64_t stride_w, int64_t begin, int64_t rows, bool add,
                               float* gradient, const Buffers& buffers) {
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
                    read_tile(x, rh.begin, rw.begin, rh.count, rw.count, buffers.x, pitch_of(rw.count));
                    c.x = buffers.x;
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
                    c.y = buffers.y;
                    c.y_pitch = w.taps.count * kLanes;
                    c.y_step = kLanes;
                    c.y_rows = int(rows);
                    c.y_cols = int(w.taps.count);
                    c.add = add;
                    correlate(c);
                    add = true;
                }
        }
}

// Sums of this many products are added up in pairs of levels: those of an image or more, and the rest.
constexpr int64_t kProductsPerLevel = 4096;

static void run_weight_gradient(const Call& call) {
    const rk_problem& p = *call.problem;
    const WeightPlan plan = weight_plan(p);
    const WeightFloats floats = weight_floats(plan);
    const int64_t phases_h = plan.a.h.stride, phases_w = plan.a.w.stride;
    const int64_t jobs = group_count(p.channels) * phases_h * phases_w * plan.blocks;
    const int64_t images = divide_up(kProductsPerLevel, p.out_h * p.out_w);
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Buffers buffers;
        buffers.y = reinterpret_cast<float*>(call.workspace + thread * call.workspace_stride);
        buffers.sum = buffers.y + floats.filter;
        float* gradient = buffers.sum + floats.filter;
        buffers.x = gradient + floats.gradient;
        for (int64_t i = jobs * thread / threads; i < jobs * (thread + 1) / threads; i++) {
            const int64_t begin = i % plan.blocks * plan.block_rows, unit = i / plan.blocks;
            const int64_t stride_w = unit % phases_w, stride_h = unit / phases_w % phases_h;
            const int64_t group = unit / phases_w / phases_h;
            const Image weight = lattice_of(filter_image(p, call.weight, group), phase(plan.a.h, stride_h).taps,
                                            phase(plan.a.w, stride_w).taps);
            const int64_t rows = at_most(plan.block_rows, weight.rows - begin);
            if (rows <= 0 || !weight.cols) continue;
            clear(buffers.sum, rows * weight.cols);
            for (int64_t n = 0; n < p.batch; n++) {
                add_image_gradient(call, plan, n, group, stride_h, stride_w, begin, rows, n % images > 0, gradient,
                                   buffers);
                if (n % images == images - 1 || n == p.batch - 1)
                    for (int64_t k = 0; k < rows * weight.cols * kLanes; k += kLanes)
                        store(buffers.sum + k, load(buffers.sum + k) + load(buffers.y + k));
            }
            write_tile(weight, begin, 0, rows, weight.cols, buffers.sum, weight.cols * kLanes, Vec{}, false);
        }
    }
}

// ---------------------------------------------------------------- the algorithm

static bool supports(const rk_problem& p) {
    const bool h = p.stride_h == 1 || p.dilation_h == 1, w = p.stride_w == 1 || p.dilation_w == 1;
    return h && w;
}

static size_t workspace_bytes(const rk_problem& p) {
    if (p.pass == RK_GRAD_WEIGHT) return weight_workspace(weight_plan(p));
    Call call = {};
    call.problem = &p;
    return tile_workspace(source(call));
}

// The "spectrum" is every group's packed filter.
static size_t spectrum_bytes(const rk_problem& p) {
    return group_count(p.channels) * filter_floats(p) * sizeof(float);
}

static void prepare(const Call& call) {
    const rk_problem& p = *call.problem;
    float* packed = static_cast<float*>(const_cast<void*>(call.spectrum));
    for (int64_t group = 0; group < group_count(p.channels); group++)
        read_tile(filter_image(p, call.weight, group), 0, 0, p.kernel_h, p.kernel_w, packed + group * filter_floats(p),
                  p.kernel_w * kLanes);
}

static void run(const Call& call) {
    if (call.problem->pass == RK_GRAD_WEIGHT)
        run_weight_gradient(call);
    else
        run_tiles(call);
}

}  // namespace direct_passes

static const Algorithm direct = {
    direct_passes::supports,
    direct_passes::workspace_bytes,
    direct_passes::spectrum_bytes,
    direct_passes::prepare,
    direct_passes::run,
};

}  // namespace RK_ISA

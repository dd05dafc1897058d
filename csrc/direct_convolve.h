// Forward pass and input gradient of the direct algorithm: tiles of outputs in parallel.
//
// Workspace of one thread: a packed filter, an input tile of kTileBytes (more when a few rows of outputs need more) and
// an output tile no larger.
#pragma once

#include <omp.h>

#include "direct_plan.h"

namespace RK_ISA {
namespace direct {

constexpr int64_t kBandBytes = 1 << 19;

static bool is_packed(const Image& image) {
    return image.dtype == RK_F32 && image.c == 1 && image.channels == kLanes;
}

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
    // All groups of a band go through the cache before the next band when nothing is packed.
    const bool in_place = p.dtype == RK_F32 && s.x_stride[1] == 1 && reads_in_place(p.kernel_w, s.x_stride[3]);
    const int64_t band = kBandBytes / (s.x_cols * p.channels * int64_t(sizeof(float)));
    s.tiling = tile(divide_up(s.y_rows, s.phases_h), divide_up(s.y_cols, s.phases_w), p.kernel_h, p.kernel_w,
                    in_place ? at_least(4, band) : s.y_rows,
                    p.batch * group_count(p.channels) * s.phases_h * s.phases_w);
    return s;
}

struct Job {
    int64_t n, group, phase_h, phase_w, tile_row, tile_col;
};

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
    const auto first_tap = [&](const Lattice& taps, int64_t size) {  // where `read_filter` has put it
        return s.flipped ? size - 1 - (taps.first + (taps.count - 1) * taps.step) : taps.first;
    };
    for (int64_t i = 0; i < s.sums_h; i++)
        for (int64_t j = 0; j < s.sums_w; j++) {
            const Phase h = phase(a.h, job.phase_h + i), w = phase(a.w, job.phase_w + j);
            const Image x =
                s.flipped ? lattice_of(x_all, h.output, w.output) : lattice_of(x_all, h.input, w.input);
            const Reach rh = reach(row, rows, h.taps.count, s.flipped ? h.taps.count - 1 - h.pad : h.pad, x.rows);
            const Reach rw = reach(col, cols, w.taps.count, s.flipped ? w.taps.count - 1 - w.pad : w.pad, x.cols);
            if (is_packed(x) && reads_in_place(w.taps.count, x.w)) {
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
            c.w = buffers.filter + (first_tap(h.taps, p.kernel_h) * p.kernel_w + first_tap(w.taps, p.kernel_w)) * kLanes;
            c.w_pitch = h.taps.step * p.kernel_w * kLanes;
            c.w_step = w.taps.step * kLanes;
            c.kernel_rows = int(h.taps.count);
            c.kernel_cols = int(w.taps.count);
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
            if (packed != job.group) {
                read_filter(p, call.weight, job.group, filter);
                packed = job.group;
            }
            correlate_tile(call, s, job, buffers);
        }
    }
}

}  // namespace direct
}  // namespace RK_ISA

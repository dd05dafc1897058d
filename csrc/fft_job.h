// A planned call: its transforms, its tensors, and how a thread's workspace is divided.
#pragma once

#include <omp.h>

#include "fft_tile.h"
#include "kernels.h"

namespace RK_ISA::spectral {

// Working memory of one thread: planes, a spectrum for each group of a line and what it keeps, and less than 256 KiB of lines
// and scratch.
static int64_t line_floats(const Plan& plan) {
    return plan.block * 2 * (most(most(plan.cols.window, plan.cols.step), plan.cols.taps) + 1) * kLanes;
}

// Of the windows, or of the outputs, of all but one group of a line.
static int64_t kept_floats(const Plan& plan) {
    const int64_t rows = most(plan.rows.window, plan.rows.step), cols = most(plan.cols.window, plan.cols.step);
    return plan.line > plan.block ? (plan.line - 1) * rows * (cols + 1) * kLanes : 0;
}

static int64_t workspace_floats(const Plan& plan) {
    return (plan.block + plan.others) * plan.plane_floats() + plan.line * plan.spectrum_floats() + 2 * kScratchFloats +
           line_floats(plan) + 2 * kept_floats(plan);
}

static Workspace divide(const Plan& plan, char* memory) {
    float* next = reinterpret_cast<float*>(memory);
    const auto take = [&](int64_t floats) {
        float* taken = next;
        next += floats;
        return taken;
    };
    Workspace work;
    for (int g = 0; g < plan.block; g++) work.planes[g] = {take(plan.plane_floats()), plan.pitch()};
    for (int g = 0; g < plan.others; g++) work.other_planes[g] = {take(plan.plane_floats()), plan.pitch()};
    work.scratch = take(kScratchFloats);
    work.other_scratch = take(kScratchFloats);
    work.spectrum = take(plan.line * plan.spectrum_floats());
    work.lines = take(line_floats(plan));
    work.kept_inputs = take(kept_floats(plan));
    work.kept_outputs = take(kept_floats(plan));
    return work;
}

struct Transforms {
    Transform data_cols, data_rows, kernel_cols, kernel_rows, plain_cols, plain_rows;
};

static void make_transforms(const Plan& plan, Transforms& t) {
    const FftSize cols = plan.cols.size, rows = plan.rows.size;
    make_transform(t.data_cols, cols.outer, cols.inner, plan.cols.data_shift);
    make_transform(t.kernel_cols, cols.outer, cols.inner, plan.cols.kernel_shift);
    make_transform(t.plain_cols, cols.outer, cols.inner, 0);
    make_transform(t.data_rows, rows.outer, rows.inner, plan.rows.data_shift);
    make_transform(t.kernel_rows, rows.outer, rows.inner, plan.rows.kernel_shift);
    make_transform(t.plain_rows, rows.outer, rows.inner, 0);
}

constexpr int64_t kStreamedBytes = 16 << 20;  // measured

// Whether the results outgrow the caches and are written in whole lines, several groups at a time. On Intel's processors they
// take 0.62 to 1.0 of the time if they go past the caches.
static bool streams(const Call& call, const Plan& plan) {
    const rk_problem& p = *call.problem;
    const bool transposed = p.pass == RK_GRAD_INPUT;
    const int64_t* stride = transposed ? p.input_stride : p.output_stride;
    const int64_t pixels = transposed ? p.in_h * p.in_w : p.out_h * p.out_w;
    const uintptr_t first = reinterpret_cast<uintptr_t>(transposed ? call.input : call.output) / sizeof(float);
    const int64_t places[] = {int64_t(first), stride[0], stride[2], stride[3]};
    for (const int64_t place : places)
        if (place % kLine != 0) return false;
    return intel() && p.pass != RK_GRAD_WEIGHT && p.dtype == RK_F32 && stride[1] == 1 && plan.line >= most(2, kLineGroups) &&
           p.batch * p.channels * pixels * int64_t(sizeof(float)) > kStreamedBytes;
}

// A call, planned.
struct Job {
    const Call& call;
    const rk_problem& problem;
    Plan plan;
    Transforms transforms;
    bool streamed;

    explicit Job(const Call& call) : call(call), problem(*call.problem) {
        make_plan(problem, plan);
        make_transforms(plan, transforms);
        streamed = streams(call, plan);
    }
    Workspace workspace(int64_t slot) const { return divide(plan, call.workspace + slot * call.workspace_stride); }
    Image input(int64_t image, int64_t group) const {
        const rk_problem& p = problem;
        return group_image(call.input, p.input_stride, p.in_h, p.in_w, p.channels, p.dtype, image, group);
    }
    Image output(int64_t image, int64_t group) const {
        const rk_problem& p = problem;
        return group_image(call.output, p.output_stride, p.out_h, p.out_w, p.channels, p.dtype, image, group);
    }
    Image weight(int64_t group) const {
        return filter_image(problem, call.weight, group);
    }
};

// A tile of some groups of an image: where its window is, and its outputs. In the input gradient they change places.
struct Tile {
    int64_t row, col, out_row, out_col, height, width;
    Image in[kMaxBlock], out[kMaxBlock];
};
static Tile tile_of(const Job& job, int64_t first, int groups, int64_t image, int64_t tile) {
    const Axis &rows = job.plan.rows, &cols = job.plan.cols;
    const int64_t down = tile / cols.tiles, right = tile % cols.tiles;
    Tile t = {rows.start(down), cols.start(right), down * rows.step, right * cols.step, rows.outputs(down), cols.outputs(right),
              {}, {}};
    const bool transposed = job.problem.pass == RK_GRAD_INPUT;
    for (int g = 0; g < groups; g++) {
        t.in[g] = transposed ? job.output(image, first + g) : job.input(image, first + g);
        t.out[g] = transposed ? job.input(image, first + g) : job.output(image, first + g);
        t.out[g].streamed = job.streamed;
    }
    return t;
}

}  // namespace RK_ISA::spectral

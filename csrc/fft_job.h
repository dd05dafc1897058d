// A planned call: its transforms, its tensors, and how a thread's workspace is divided.
#pragma once

#include <omp.h>

#include "fft_tile.h"
#include "kernels.h"

namespace RK_ISA::spectral {

// Working memory of one thread: a plane and a spectrum for each group of a block, a plane more, and less than 128 KiB of
// lines and scratch.
static int64_t line_floats(const Plan& plan) {
    return 2 * (most(most(plan.cols.window, plan.cols.step), plan.cols.taps) + 1) * kLanes;
}

static int64_t workspace_floats(const Plan& plan) {
    return plan.block * (plan.plane_floats() + plan.spectrum_floats()) + plan.plane_floats() + 2 * kScratchFloats +
           line_floats(plan);
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
    work.other_plane = {take(plan.plane_floats()), plan.pitch()};
    work.scratch = take(kScratchFloats);
    work.other_scratch = take(kScratchFloats);
    work.spectrum = take(plan.block * plan.spectrum_floats());
    work.lines = take(line_floats(plan));
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

// A call, planned.
struct Job {
    const Call& call;
    const rk_problem& problem;
    Plan plan;
    Transforms transforms;

    explicit Job(const Call& call) : call(call), problem(*call.problem) {
        make_plan(problem, plan);
        make_transforms(plan, transforms);
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

}  // namespace RK_ISA::spectral

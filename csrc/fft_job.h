// A planned call: its transforms, its tensors, and how a thread's workspace is divided.
#pragma once

#include <omp.h>

#include "fft_tile.h"
#include "kernels.h"

namespace RK_ISA::spectral {

// A thread goes through the images for several groups at a time, as many as the spectra allow: neighbouring groups
// share the pages, and where channels are adjacent in memory the lines, of a tensor that exceeds the caches.
constexpr int64_t kSpectraFloats = 1 << 20;

static int64_t block_groups(const Plan& plan, int threads) {
    const int64_t own = (plan.groups + threads - 1) / threads;
    return most(1, least(own, kSpectraFloats / plan.spectrum_floats()));
}

// A filter used once is multiplied column by column and never stored as a spectrum.
static bool filter_used_once(const Plan& plan) { return plan.images * plan.tiles == 1; }

// Working memory of one thread: two planes, the spectra of a block of groups (4 MiB, or a single one that is larger),
// and less than 256 KiB of lines and scratch.
static int64_t workspace_floats(const Plan& plan, int threads) {
    const int64_t lines = 2 * most(plan.cols.window, plan.cols.step) * kLanes;
    return 2 * plan.plane_floats() + block_groups(plan, threads) * plan.spectrum_floats() + 2 * kScratchFloats + lines;
}

static Workspace divide(const Plan& plan, char* memory) {
    float* next = reinterpret_cast<float*>(memory);
    const auto take = [&](int64_t floats) {
        float* taken = next;
        next += floats;
        return taken;
    };
    Workspace work;
    work.plane = {take(plan.plane_floats()), plan.pitch()};
    work.other_plane = {take(plan.plane_floats()), plan.pitch()};
    work.scratch = take(kScratchFloats);
    work.other_scratch = take(kScratchFloats);
    work.lines = take(2 * most(plan.cols.window, plan.cols.step) * kLanes);
    work.spectra = next;
    return work;
}

struct Transforms {
    Transform data_cols, data_rows, kernel_cols, kernel_rows, plain_cols, plain_rows;
};

static void make_transforms(const Plan& plan, Transforms& t) {
    const FftSize cols = plan.cols.size, rows = plan.rows.size;
    Roots roots;
    make_roots(roots, cols.points());
    make_transform(t.data_cols, roots, cols.outer, cols.inner, plan.cols.data_shift);
    make_transform(t.kernel_cols, roots, cols.outer, cols.inner, plan.cols.kernel_shift);
    make_transform(t.plain_cols, roots, cols.outer, cols.inner, 0);
    make_roots(roots, rows.points());
    make_transform(t.data_rows, roots, rows.outer, rows.inner, plan.rows.data_shift);
    make_transform(t.kernel_rows, roots, rows.outer, rows.inner, plan.rows.kernel_shift);
    make_transform(t.plain_rows, roots, rows.outer, rows.inner, 0);
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
        const int64_t kh = problem.kernel_h, kw = problem.kernel_w, stride[4] = {0, kh * kw, kw, 1};
        return group_image(call.weight, stride, kh, kw, problem.channels, RK_F32, 0, group);
    }
};

}  // namespace RK_ISA::spectral

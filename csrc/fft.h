// Depthwise convolution by two-dimensional real FFTs, one group of kLanes channels at a time.
//
//   forward, input gradient   rows -> planes; each column: transform, times the filter's spectrum, inverse; rows
//   weight gradient           each column of input and output gradient: transform, product summed over images and
//                             tiles; then one inverse for each group
// Images too large for one transform are cut into overlapping tiles. Threads take groups x images x tiles.
#pragma once

#include <omp.h>

#include "fft_tile.h"
#include "kernels.h"

namespace RK_ISA::spectral {

// Bytes of the parts of a thread's workspace: one plane (two and a sum of spectra in the weight gradient), one
// spectrum, and less than 128 KiB of lines and scratch.
static int64_t workspace_floats(const Plan& plan, bool weight_gradient) {
    const int64_t lines = 2 * most(plan.cols.window, plan.cols.step) * kLanes;
    return plan.plane_floats() * (weight_gradient ? 2 : 1) + plan.spectrum_floats() + lines + 2 * kScratchFloats;
}

static Workspace divide(const Plan& plan, bool weight_gradient, char* memory) {
    float* next = reinterpret_cast<float*>(memory);
    const auto take = [&](int64_t floats) {
        float* taken = next;
        next += floats;
        return taken;
    };
    Workspace work;
    work.plane = take(plan.plane_floats());
    work.other_plane = weight_gradient ? take(plan.plane_floats()) : nullptr;
    work.spectrum = take(plan.spectrum_floats());
    work.scratch = take(kScratchFloats);
    work.other_scratch = take(kScratchFloats);
    work.lines = next;
    return work;
}

static Image weight_image(const rk_problem& p, float* weight, int64_t group) {
    const int64_t taps = int64_t(p.kernel_h) * p.kernel_w, stride[4] = {0, taps, p.kernel_w, 1};
    return group_image(weight, stride, p.kernel_h, p.kernel_w, p.channels, RK_F32, 0, group);
}

struct Transforms {
    Transform data_cols, data_rows, kernel_cols, kernel_rows, inverse_cols, inverse_rows;
};

static void make_transforms(const Plan& plan, Transforms& t) {
    const FftSize cols = plan.cols.size, rows = plan.rows.size;
    make_transform(t.data_cols, cols.outer, cols.inner, plan.cols.data_shift);
    make_transform(t.data_rows, rows.outer, rows.inner, plan.rows.data_shift);
    make_transform(t.kernel_cols, cols.outer, cols.inner, plan.cols.kernel_shift);
    make_transform(t.kernel_rows, rows.outer, rows.inner, plan.rows.kernel_shift);
    make_transform(t.inverse_cols, cols.outer, cols.inner, 0);
    make_transform(t.inverse_rows, rows.outer, rows.inner, 0);
}

static void filter_spectrum(const Plan& plan, const Transforms& t, const Image& weight, float* spectrum,
                            const Workspace& work) {
    const Plane plane = {work.plane, plan.pitch};
    read_kernel(plan, weight, spectrum, work.lines);  // the spectrum's memory is free until the rows are done
    kernel_rows(t.kernel_cols, plan, spectrum, plane, work);
    for (int bin = 0; bin < plan.bins; bin++) {
        forward_outer(t.kernel_rows, plane.column(bin), int(plan.rows.taps), work.scratch);
        kInner.spectrum[t.kernel_rows.inner](work.scratch, t.kernel_rows.outer, spectrum);
        spectrum += plan.rows.size.points() * kComplex;
    }
}

static void convolve_tile(const Plan& plan, const Transforms& t, const Image& input, const Image& output,
                          int64_t tile, const float* spectrum, Vec bias, bool relu, const Workspace& work) {
    const int64_t down = tile / plan.cols.tiles, right = tile % plan.cols.tiles;
    const Plane plane = {work.plane, plan.pitch};
    const int64_t height = plan.rows.outputs(down), width = plan.cols.outputs(right);
    const int filled = window_rows(t.data_cols, input, plan.rows.start(down), plan.cols.start(right),
                                   plan.rows.window, plan.cols.window, plane, work);
    for (int bin = 0; bin < plan.bins; bin++) {
        forward_outer(t.data_rows, plane.column(bin), filled, work.scratch);
        kInner.convolve[t.data_rows.inner](work.scratch, t.data_rows.outer, spectrum);
        inverse_outer(t.inverse_rows, work.scratch, int(height), plane.column(bin));
        spectrum += plan.rows.size.points() * kComplex;
    }
    image_rows(t.inverse_cols, plane, output, down * plan.rows.step, right * plan.cols.step, height, width,
               plan.scale, bias, relu, work);
}

// Forward and input gradient.
static void fft_convolve(const Call& call, const Plan& plan) {
    const rk_problem& p = *call.problem;
    const bool transposed = p.pass == RK_GRAD_INPUT;
    Transforms transforms;
    make_transforms(plan, transforms);
    const int64_t items = plan.groups * plan.images * plan.tiles;
#pragma omp parallel num_threads(p.threads)
    {
        const Workspace work = divide(plan, false, call.workspace + omp_get_thread_num() * call.workspace_stride);
        int64_t ready = -1;  // the group whose spectrum is in the workspace
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; item++) {
            const int64_t tile = item % plan.tiles, image = item / plan.tiles % plan.images;
            const int64_t group = item / plan.tiles / plan.images;
            const float* spectrum = work.spectrum;
            if (call.spectrum) {
                spectrum = static_cast<const float*>(call.spectrum) + group * plan.spectrum_floats();
            } else if (group != ready) {
                filter_spectrum(plan, transforms, weight_image(p, call.weight, group), work.spectrum, work);
                ready = group;
            }
            const Image input = group_image(call.input, p.input_stride, p.in_h, p.in_w, p.channels, p.dtype, image, group);
            const Image output =
                group_image(call.output, p.output_stride, p.out_h, p.out_w, p.channels, p.dtype, image, group);
            convolve_tile(plan, transforms, transposed ? output : input, transposed ? input : output, tile, spectrum,
                          load_channels(call.bias, output), p.relu, work);
        }
    }
}

static void fft_prepare(const Call& call) {
    const rk_problem& p = *call.problem;
    Plan plan;
    make_plan(p, plan);
    Transforms transforms;
    make_transforms(plan, transforms);
#pragma omp parallel num_threads(p.threads)
    {
        const Workspace work = divide(plan, false, call.workspace + omp_get_thread_num() * call.workspace_stride);
#pragma omp for schedule(static)
        for (int group = 0; group < plan.groups; group++) {
            float* spectrum = static_cast<float*>(const_cast<void*>(call.spectrum)) + group * plan.spectrum_floats();
            filter_spectrum(plan, transforms, weight_image(p, call.weight, group), spectrum, work);
        }
    }
}

// Adds one tile of one image to the sum of spectra.
static void correlate_tile(const Plan& plan, const Transforms& t, const Image& input, const Image& output,
                           int64_t tile, const Workspace& work) {
    const int64_t down = tile / plan.cols.tiles, right = tile % plan.cols.tiles;
    const Plane x = {work.plane, plan.pitch}, g = {work.other_plane, plan.pitch};
    const int x_filled = window_rows(t.data_cols, input, plan.rows.start(down), plan.cols.start(right),
                                     plan.rows.window, plan.cols.window, x, work);
    const int g_filled = window_rows(t.inverse_cols, output, down * plan.rows.step, right * plan.cols.step,
                                     plan.rows.outputs(down), plan.cols.outputs(right), g, work);
    float* sum = work.spectrum;
    for (int bin = 0; bin < plan.bins; bin++) {
        forward_outer(t.data_rows, x.column(bin), x_filled, work.scratch);
        forward_outer(t.inverse_rows, g.column(bin), g_filled, work.other_scratch);
        kInner.correlate[t.data_rows.inner](work.scratch, work.other_scratch, t.data_rows.outer, sum);
        sum += plan.rows.size.points() * kComplex;
    }
}

// Turns the sum of spectra into the taps that matter, as [taps][taps][kLanes] in the memory of the other plane.
static void gradient_taps(const Plan& plan, const Transforms& t, const Workspace& work) {
    const Plane plane = {work.plane, plan.pitch};
    const Axis &rows = plan.rows, &cols = plan.cols;
    for (int bin = 0; bin < plan.bins; bin++) {
        kInner.inverse[t.inverse_rows.inner](work.spectrum + bin * rows.size.points() * kComplex,
                                             t.inverse_rows.outer, work.scratch);
        inverse_outer(t.inverse_rows, work.scratch, int(rows.taps), plane.column(bin));
    }
    const int64_t stride[4] = {0, 1, cols.taps * kLanes, kLanes};
    const Image taps = group_image(work.other_plane, stride, rows.taps, cols.taps, kLanes, RK_F32, 0, 0);
    image_rows(t.inverse_cols, plane, taps, 0, 0, rows.taps, cols.taps, plan.scale, Vec{}, false, work);
}

static void write_taps(const Plan& plan, const Image& weight, const float* taps) {
    const Axis &rows = plan.rows, &cols = plan.cols;
    memset(weight.data, 0, weight.channels * weight.c * sizeof(float));
    for (int64_t kh = 0; kh < weight.rows; kh++) {
        const int64_t row = kh * rows.dilation - rows.first_tap;
        if (row < 0 || row >= rows.taps) continue;
        if (cols.dilation == 1) {
            write_tile(weight, kh, cols.first_tap, 1, cols.taps, taps + row * cols.taps * kLanes, 0, Vec{}, false);
            continue;
        }
        for (int64_t kw = 0; kw < weight.cols; kw++) {
            const int64_t col = kw * cols.dilation - cols.first_tap;
            if (col < 0 || col >= cols.taps) continue;
            write_tile(weight, kh, kw, 1, 1, taps + (row * cols.taps + col) * kLanes, 0, Vec{}, false);
        }
    }
}

// Where there are more threads than groups, they share a group's images and tiles; their sums are added in order.
static void fft_correlate(const Call& call, const Plan& plan) {
    const rk_problem& p = *call.problem;
    Transforms transforms;
    make_transforms(plan, transforms);
    const int64_t all = plan.images * plan.tiles;
    const int64_t chunks = most(1, least(all, p.threads / plan.groups));
    const auto workspace = [&](int64_t slot) {
        return divide(plan, true, call.workspace + slot * call.workspace_stride);
    };
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < plan.groups * chunks; item++) {
            const int64_t group = item / chunks, chunk = item % chunks;
            const Workspace work = workspace(chunks > 1 ? item : omp_get_thread_num());
            clear(work.spectrum, plan.spectrum_floats() / kLanes);
            for (int64_t i = all * chunk / chunks; i < all * (chunk + 1) / chunks; i++) {
                const int64_t image = i / plan.tiles;
                correlate_tile(
                    plan, transforms,
                    group_image(call.input, p.input_stride, p.in_h, p.in_w, p.channels, p.dtype, image, group),
                    group_image(call.output, p.output_stride, p.out_h, p.out_w, p.channels, p.dtype, image, group),
                    i % plan.tiles, work);
            }
            gradient_taps(plan, transforms, work);
            if (chunks == 1) write_taps(plan, weight_image(p, call.weight, group), work.other_plane);
        }
        if (chunks > 1) {
#pragma omp for schedule(static)
            for (int group = 0; group < plan.groups; group++) {
                float* sum = workspace(group * chunks).other_plane;
                for (int64_t chunk = 1; chunk < chunks; chunk++) {
                    const float* part = workspace(group * chunks + chunk).other_plane;
                    for (int64_t i = 0; i < plan.rows.taps * plan.cols.taps; i++)
                        store(sum + i * kLanes, load(sum + i * kLanes) + load(part + i * kLanes));
                }
                write_taps(plan, weight_image(p, call.weight, group), sum);
            }
        }
    }
}

}  // namespace RK_ISA::spectral

namespace RK_ISA {

static const Algorithm fft = {
    [](const rk_problem& p) {
        spectral::Plan plan;
        return spectral::make_plan(p, plan);
    },
    [](const rk_problem& p) -> size_t {
        spectral::Plan plan;
        return spectral::make_plan(p, plan) ? spectral::workspace_floats(plan, p.pass == RK_GRAD_WEIGHT) * sizeof(float) : 0;
    },
    [](const rk_problem& p) -> size_t {
        spectral::Plan plan;
        return spectral::make_plan(p, plan) ? plan.groups * plan.spectrum_floats() * sizeof(float) : 0;
    },
    spectral::fft_prepare,
    [](const Call& call) {
        spectral::Plan plan;
        spectral::make_plan(*call.problem, plan);
        (call.problem->pass == RK_GRAD_WEIGHT ? spectral::fft_correlate : spectral::fft_convolve)(call, plan);
    },
};

}  // namespace RK_ISA

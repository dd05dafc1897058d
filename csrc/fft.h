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
    work.plane = {take(plan.plane_floats()), plan.pitch};
    work.other_plane = {take(plan.plane_floats()), plan.pitch};
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

// The rows of a group's filter, transformed, in the other plane.
static void filter_rows(const Job& job, int64_t group, const Workspace& work) {
    float* taps = work.plane.data;  // free until the input's rows are transformed
    read_kernel(job.plan, job.weight(group), taps, work.lines);
    kernel_rows(job.transforms.kernel_cols, job.plan, taps, work.other_plane, work);
}

static void filter_spectrum(const Job& job, int64_t group, float* spectrum, const Workspace& work) {
    const Transform& t = job.transforms.kernel_rows;
    filter_rows(job, group, work);
    for (int bin = 0; bin < job.plan.bins; bin++, spectrum += t.size() * kComplex) {
        forward_outer(t, work.other_plane.column(bin), int(job.plan.rows.taps), work.scratch);
        kInner.spectrum[t.inner](work.scratch, t.outer, spectrum);
    }
}

// One tile of one image; without a spectrum, the filter is in the other plane.
static void convolve_tile(const Job& job, int64_t group, int64_t image, int64_t tile, const float* spectrum,
                          const Workspace& work) {
    const Plan& plan = job.plan;
    const Transforms& t = job.transforms;
    const Image input = job.input(image, group), output = job.output(image, group);
    const bool transposed = job.problem.pass == RK_GRAD_INPUT;
    const int64_t down = tile / plan.cols.tiles, right = tile % plan.cols.tiles;
    const int64_t height = plan.rows.outputs(down), width = plan.cols.outputs(right);
    const int filled = window_rows(t.data_cols, transposed ? output : input, plan.rows.start(down),
                                   plan.cols.start(right), plan.rows.window, plan.cols.window, work.plane, work);
    const int outer = t.data_rows.outer, inner = t.data_rows.inner;
    for (int bin = 0; bin < plan.bins; bin++) {
        prefetch_column(work.plane, bin + 1, filled);
        forward_outer(t.data_rows, work.plane.column(bin), filled, work.scratch);
        if (spectrum) {
            kInner.convolve[inner](work.scratch, outer, spectrum + bin * t.data_rows.size() * kComplex);
        } else {
            forward_outer(t.kernel_rows, work.other_plane.column(bin), int(plan.rows.taps), work.other_scratch);
            kInner.product[inner](work.scratch, outer, work.other_scratch);
        }
        inverse_outer(t.plain_rows, work.scratch, int(height), work.plane.column(bin));
    }
    image_rows(t.plain_cols, work.plane, transposed ? input : output, down * plan.rows.step, right * plan.cols.step,
               height, width, plan.scale, load_channels(job.call.bias, output), job.problem.relu, work);
}

// Some tiles of a block of groups: those whose number, groups outermost, is in [begin, end).
static void convolve_block(const Job& job, int64_t first, int64_t last, int64_t begin, int64_t end,
                           const Workspace& work) {
    const Plan& plan = job.plan;
    const int64_t tiles = plan.images * plan.tiles, floats = plan.spectrum_floats();
    const float* spectra = static_cast<const float*>(job.call.spectrum);
    const bool once = !spectra && filter_used_once(plan);
    for (int64_t group = first; group < last && !spectra && !once; group++)
        filter_spectrum(job, group, work.spectra + (group - first) * floats, work);
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t group = first; group < last; group++) {
            if (group * tiles + tile < begin || group * tiles + tile >= end) continue;
            if (once) filter_rows(job, group, work);
            const float* spectrum = spectra ? spectra + group * floats : work.spectra + (group - first) * floats;
            convolve_tile(job, group, tile / plan.tiles, tile % plan.tiles, once ? nullptr : spectrum, work);
        }
}

// Forward and input gradient. Each thread takes an equal share of groups x images x tiles.
static void fft_convolve(const Call& call) {
    const Job job(call);
    const Plan& plan = job.plan;
    const int64_t tiles = plan.images * plan.tiles, block = block_groups(plan, job.problem.threads);
#pragma omp parallel num_threads(job.problem.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t begin = plan.groups * tiles * thread / threads;
        const int64_t end = plan.groups * tiles * (thread + 1) / threads;
        const Workspace work = job.workspace(thread);
        const int64_t stop = begin < end ? (end - 1) / tiles + 1 : 0;
        for (int64_t group = begin < end ? begin / tiles : 0; group < stop; group += block)
            convolve_block(job, group, least(group + block, stop), begin, end, work);
    }
}

static void fft_prepare(const Call& call) {
    const Job job(call);
    float* spectra = static_cast<float*>(const_cast<void*>(call.spectrum));
#pragma omp parallel num_threads(job.problem.threads)
    {
        const Workspace work = job.workspace(omp_get_thread_num());
#pragma omp for schedule(static)
        for (int group = 0; group < job.plan.groups; group++)
            filter_spectrum(job, group, spectra + group * job.plan.spectrum_floats(), work);
    }
}

// Adds one tile of one image to the sum of spectra.
static void correlate_tile(const Job& job, int64_t group, int64_t image, int64_t tile, float* sum,
                           const Workspace& work) {
    const Plan& plan = job.plan;
    const Transforms& t = job.transforms;
    const int64_t down = tile / plan.cols.tiles, right = tile % plan.cols.tiles;
    const Plane &x = work.plane, &g = work.other_plane;
    const int x_filled = window_rows(t.data_cols, job.input(image, group), plan.rows.start(down), plan.cols.start(right),
                                     plan.rows.window, plan.cols.window, x, work);
    const int g_filled = window_rows(t.plain_cols, job.output(image, group), down * plan.rows.step, right * plan.cols.step,
                                     plan.rows.outputs(down), plan.cols.outputs(right), g, work);
    for (int bin = 0; bin < plan.bins; bin++, sum += t.data_rows.size() * kComplex) {
        prefetch_column(x, bin + 1, x_filled);
        prefetch_column(g, bin + 1, g_filled);
        forward_outer(t.data_rows, x.column(bin), x_filled, work.scratch);
        forward_outer(t.plain_rows, g.column(bin), g_filled, work.other_scratch);
        kInner.correlate[t.data_rows.inner](work.scratch, work.other_scratch, t.data_rows.outer, sum);
    }
}

// Turns a sum of spectra into the taps that matter, as [taps][taps][kLanes] in the memory of the other plane.
static void gradient_taps(const Job& job, const float* sum, const Workspace& work) {
    const Axis &rows = job.plan.rows, &cols = job.plan.cols;
    const Transform& t = job.transforms.plain_rows;
    for (int bin = 0; bin < job.plan.bins; bin++, sum += t.size() * kComplex) {
        kInner.inverse[t.inner](sum, t.outer, work.scratch);
        inverse_outer(t, work.scratch, int(rows.taps), work.plane.column(bin));
    }
    const int64_t stride[4] = {0, 1, cols.taps * kLanes, kLanes};
    const Image taps = group_image(work.other_plane.data, stride, rows.taps, cols.taps, kLanes, RK_F32, 0, 0);
    image_rows(job.transforms.plain_cols, work.plane, taps, 0, 0, rows.taps, cols.taps, job.plan.scale, Vec{}, false,
               work);
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

// All images of the groups [first, last), which one thread has to itself.
static void correlate_block(const Job& job, int64_t first, int64_t last, const Workspace& work) {
    const Plan& plan = job.plan;
    const int64_t floats = plan.spectrum_floats();
    clear(work.spectra, (last - first) * floats / kLanes);
    for (int64_t tile = 0; tile < plan.images * plan.tiles; tile++)
        for (int64_t group = first; group < last; group++)
            correlate_tile(job, group, tile / plan.tiles, tile % plan.tiles, work.spectra + (group - first) * floats,
                           work);
    for (int64_t group = first; group < last; group++) {
        gradient_taps(job, work.spectra + (group - first) * floats, work);
        write_taps(plan, job.weight(group), work.other_plane.data);
    }
}

static void correlate_by_groups(const Job& job) {
    const int64_t block = block_groups(job.plan, job.problem.threads);
#pragma omp parallel num_threads(job.problem.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t end = job.plan.groups * (thread + 1) / threads;
        for (int64_t group = job.plan.groups * thread / threads; group < end; group += block)
            correlate_block(job, group, least(group + block, end), job.workspace(thread));
    }
}

// Each group is shared by `chunks` threads; their parts of the gradient are added in order.
static void correlate_by_images(const Job& job, int64_t chunks) {
    const Plan& plan = job.plan;
    const int64_t tiles = plan.images * plan.tiles;
#pragma omp parallel num_threads(job.problem.threads)
    {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < plan.groups * chunks; part++) {
            const int64_t group = part / chunks, chunk = part % chunks;
            const Workspace work = job.workspace(part);
            clear(work.spectra, plan.spectrum_floats() / kLanes);
            for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; tile++)
                correlate_tile(job, group, tile / plan.tiles, tile % plan.tiles, work.spectra, work);
            gradient_taps(job, work.spectra, work);
        }
#pragma omp for schedule(static)
        for (int group = 0; group < plan.groups; group++) {
            float* sum = job.workspace(group * chunks).other_plane.data;
            for (int64_t chunk = 1; chunk < chunks; chunk++) {
                const float* part = job.workspace(group * chunks + chunk).other_plane.data;
                for (int64_t i = 0; i < plan.rows.taps * plan.cols.taps; i++)
                    store(sum + i * kLanes, load(sum + i * kLanes) + load(part + i * kLanes));
            }
            write_taps(plan, job.weight(group), sum);
        }
    }
}

static void fft_correlate(const Call& call) {
    const Job job(call);
    const int64_t chunks = least(job.plan.images * job.plan.tiles, job.problem.threads / job.plan.groups);
    if (chunks > 1)
        correlate_by_images(job, chunks);
    else
        correlate_by_groups(job);
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
        return spectral::make_plan(p, plan) ? spectral::workspace_floats(plan, p.threads) * sizeof(float) : 0;
    },
    [](const rk_problem& p) -> size_t {
        spectral::Plan plan;
        return spectral::make_plan(p, plan) ? plan.groups * plan.spectrum_floats() * sizeof(float) : 0;
    },
    spectral::fft_prepare,
    [](const Call& call) {
        (call.problem->pass == RK_GRAD_WEIGHT ? spectral::fft_correlate : spectral::fft_convolve)(call);
    },
};

}  // namespace RK_ISA

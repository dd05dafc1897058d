// Forward pass and input gradient: each column of a tile is transformed, multiplied by the filter's spectrum and
// transformed back.
#pragma once

#include "fft_job.h"

namespace RK_ISA::spectral {

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
static void convolve(const Call& call) {
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

static void prepare(const Call& call) {
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

}  // namespace RK_ISA::spectral

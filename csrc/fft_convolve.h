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

// Forward and input gradient. Each thread takes an equal share of groups x images x tiles, groups outermost.
static void convolve(const Call& call) {
    const Job job(call);
    const Plan& plan = job.plan;
    const float* prepared = static_cast<const float*>(call.spectrum);
    const int64_t tiles = plan.images * plan.tiles, all = plan.groups * tiles;
    const bool once = filter_used_once(plan);
#pragma omp parallel num_threads(job.problem.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const Workspace work = job.workspace(thread);
        int64_t ready = -1;  // the group whose filter is in the workspace
        for (int64_t item = all * thread / threads; item < all * (thread + 1) / threads; item++) {
            const int64_t group = item / tiles, tile = item % tiles;
            const float* spectrum = work.spectrum;
            if (prepared) {
                spectrum = prepared + group * plan.spectrum_floats();
            } else if (once) {
                spectrum = nullptr;
                filter_rows(job, group, work);
            } else if (group != ready) {
                filter_spectrum(job, group, work.spectrum, work);
                ready = group;
            }
            convolve_tile(job, group, tile / plan.tiles, tile % plan.tiles, spectrum, work);
        }
    }
}

// Writes the spectra of all groups.
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

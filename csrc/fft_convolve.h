// Forward pass and input gradient: each column of a tile is transformed, multiplied by the filter's spectrum and
// transformed back.
#pragma once

#include "fft_job.h"

namespace RK_ISA::spectral {

// The rows of a group's filter, transformed, in the other plane. Its taps fit in the memory of a spectrum.
static void filter_rows(const Job& job, int64_t group, float* taps, const Workspace& work) {
    read_kernel(job.plan, job.weight(group), taps, work.lines);
    kernel_rows(job.transforms.kernel_cols, job.plan, taps, work.other_plane, work);
}

static void filter_spectrum(const Job& job, int64_t group, float* spectrum, const Workspace& work) {
    const Transform& t = job.transforms.kernel_rows;
    const Offsets taps(t, job.plan.rows.taps, kComplex);
    filter_rows(job, group, spectrum, work);
    for (int bin = 0; bin < job.plan.bins; bin++, spectrum += t.size() * kComplex) {
        forward_outer(t, work.other_plane.column(bin, taps), work.scratch);
        kInner.spectrum[t.inner](work.scratch, t.outer, spectrum);
    }
}

// The columns of a plane, of which `filled` rows are not zero and `height` wanted; without a spectrum, the filter is in
// the other plane.
static void convolve_columns(const Job& job, Plane plane, int64_t filled, int64_t height, const float* spectrum,
                             const Workspace& work) {
    const Transforms& t = job.transforms;
    const int outer = t.data_rows.outer, inner = t.data_rows.inner;
    const Offsets data(t.data_rows, filled, kComplex), taps(t.kernel_rows, job.plan.rows.taps, kComplex);
    const Offsets wanted(t.plain_rows, height, kComplex);
    for (int bin = 0; bin < job.plan.bins; bin++) {
        forward_outer(t.data_rows, plane.column(bin, data), work.scratch);
        if (spectrum) {
            kInner.convolve[inner](work.scratch, outer, spectrum + bin * t.data_rows.size() * kComplex);
        } else {
            forward_outer(t.kernel_rows, work.other_plane.column(bin, taps), work.other_scratch);
            kInner.product[inner](work.scratch, outer, work.other_scratch);
        }
        inverse_outer(t.plain_rows, work.scratch, plane.column(bin, wanted));
    }
}

// One tile of one image, for the groups [first, first + block); without spectra, the filters are transformed here.
static void convolve_tile(const Job& job, int64_t first, int block, int64_t image, int64_t tile, const float* spectra,
                          const Workspace& work) {
    const Plan& plan = job.plan;
    const bool transposed = job.problem.pass == RK_GRAD_INPUT;
    const int64_t down = tile / plan.cols.tiles, right = tile % plan.cols.tiles;
    const int64_t height = plan.rows.outputs(down), width = plan.cols.outputs(right);
    Image in[kMaxBlock], out[kMaxBlock];
    for (int g = 0; g < block; g++) {
        in[g] = transposed ? job.output(image, first + g) : job.input(image, first + g);
        out[g] = transposed ? job.input(image, first + g) : job.output(image, first + g);
    }
    const int64_t filled = window_rows(job.transforms.data_cols, in, block, plan.rows.start(down),
                                       plan.cols.start(right), plan.rows.window, plan.cols.window, work.planes, work);
    for (int g = 0; g < block; g++) {
        if (!spectra) filter_rows(job, first + g, work.spectrum, work);
        convolve_columns(job, work.planes[g], filled, height, spectra ? spectra + g * plan.spectrum_floats() : nullptr,
                         work);
    }
    image_rows(job.transforms.plain_cols, work.planes, out, block, down * plan.rows.step, right * plan.cols.step,
               height, width, plan.scale, job.call.bias, job.problem.relu, work);
}

// Forward and input gradient. Each thread takes an equal share of blocks x images x tiles, blocks outermost.
static void convolve(const Call& call) {
    const Job job(call);
    const Plan& plan = job.plan;
    const float* prepared = static_cast<const float*>(call.spectrum);
    const int64_t tiles = plan.images * plan.tiles, all = (plan.groups + plan.block - 1) / plan.block * tiles;
#pragma omp parallel num_threads(job.problem.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const Workspace work = job.workspace(thread);
        int64_t ready = -1;  // the first group of the block whose spectra are in the workspace
        for (int64_t item = all * thread / threads; item < all * (thread + 1) / threads; item++) {
            const int64_t first = item / tiles * plan.block, tile = item % tiles;
            const int block = int(least(plan.block, plan.groups - first));
            const float* spectra = work.spectrum;
            if (prepared) {
                spectra = prepared + first * plan.spectrum_floats();
            } else if (filter_used_once(plan)) {
                spectra = nullptr;
            } else if (first != ready) {
                for (int g = 0; g < block; g++)
                    filter_spectrum(job, first + g, work.spectrum + g * plan.spectrum_floats(), work);
                ready = first;
            }
            convolve_tile(job, first, block, tile / plan.tiles, tile % plan.tiles, spectra, work);
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

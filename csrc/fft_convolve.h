// Forward pass and input gradient, tile by tile.
#pragma once

#include "fft_line.h"

namespace RK_ISA::spectral {

// One tile of one image, for the groups [first, first + block); without spectra, the filters are transformed here.
static void convolve_block(const Job& job, int64_t first, int block, int64_t image, int64_t tile, const float* spectra,
                           const Workspace& work) {
    const Plan& plan = job.plan;
    const Tile t = tile_of(job, first, block, image, tile);
    const int64_t filled = window_rows(job.transforms.data_cols, t.in, block, t.row, t.col, plan.rows.window, plan.cols.window,
                                       work.planes, work);
    for (int g = 0; g < block; g++) {
        if (!spectra) filter_rows(job, first + g, work.spectrum, work);
        convolve_columns(job, work.planes[g], filled, t.height, spectra ? spectra + g * plan.spectrum_floats() : nullptr, work);
    }
    image_rows(job.transforms.plain_cols, work.planes, t.out, block, t.out_row, t.out_col, t.height, t.width, plan.scale,
               job.call.bias, job.problem.relu, work);
}

// Forward and input gradient. Each thread takes an equal share of lines x images x tiles, lines outermost.
static void convolve(const Call& call) {
    const Job job(call);
    const Plan& plan = job.plan;
    const float* prepared = static_cast<const float*>(call.spectrum);
    const int64_t tiles = plan.images * plan.tiles, all = plan.lines * tiles;
    const auto convolve_tile = plan.line > plan.block ? convolve_line : convolve_block;
#pragma omp parallel num_threads(job.problem.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const Workspace work = job.workspace(thread);
        int64_t ready = -1;  // the first group of the line whose spectra are in the workspace
        for (int64_t item = all * thread / threads; item < all * (thread + 1) / threads; item++) {
            const int64_t line = item / tiles, tile = item % tiles;
            const int first = plan.first_group(line), groups = plan.first_group(line + 1) - first;
            const float* spectra = work.spectrum;
            if (prepared) {
                spectra = prepared + first * plan.spectrum_floats();
            } else if (filter_used_once(plan)) {
                spectra = nullptr;
            } else if (first != ready) {
                for (int g = 0; g < groups; g++)
                    filter_spectrum(job, first + g, work.spectrum + g * plan.spectrum_floats(), work);
                ready = first;
            }
            convolve_tile(job, first, groups, tile / plan.tiles, tile % plan.tiles, spectra, work);
        }
        finish_streams();
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

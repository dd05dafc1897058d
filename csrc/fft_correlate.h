// Weight gradient: the columns of input and output gradient are transformed and their product is summed over images
// and tiles; each group of channels then needs one inverse.
#pragma once

#include "fft_job.h"

namespace RK_ISA::spectral {

// Adds one tile of one image to the sums of spectra of the groups [first, first + block).
static void correlate_tile(const Job& job, int64_t first, int block, int64_t image, int64_t tile, const Workspace& work) {
    const Plan& plan = job.plan;
    const Transforms& t = job.transforms;
    const Tile at = tile_of(job, first, block, image, tile);
    const int64_t x_filled = window_rows(t.data_cols, at.in, block, at.row, at.col, plan.rows.window, plan.cols.window,
                                         work.planes, work);
    const int64_t g_filled = window_rows(t.plain_cols, at.out, block, at.out_row, at.out_col, at.height, at.width,
                                         work.other_planes, work);
    const Offsets x_rows(t.data_rows, x_filled, kComplex), g_rows(t.plain_rows, g_filled, kComplex);
    float* sum = work.spectrum;
    for (int group = 0; group < block; group++)
        for (int bin = 0; bin < plan.bins; bin++, sum += t.data_rows.size() * kComplex) {
            forward_outer(t.data_rows, work.planes[group].column(bin, x_rows), work.scratch);
            forward_outer(t.plain_rows, work.other_planes[group].column(bin, g_rows), work.other_scratch);
            kInner.correlate[t.data_rows.inner](work.scratch, work.other_scratch, t.data_rows.outer, sum);
        }
}

// Turns a sum of spectra into the taps that matter, as [taps][taps][kLanes] in the memory of the other plane.
static void gradient_taps(const Job& job, const float* sum, const Workspace& work) {
    const Axis &rows = job.plan.rows, &cols = job.plan.cols;
    const Transform& t = job.transforms.plain_rows;
    const Offsets wanted(t, rows.taps, kComplex);
    for (int bin = 0; bin < job.plan.bins; bin++, sum += t.size() * kComplex) {
        kInner.inverse[t.inner](sum, t.outer, work.scratch);
        inverse_outer(t, work.scratch, work.planes[0].column(bin, wanted));
    }
    const int64_t stride[4] = {0, 1, cols.taps * kLanes, kLanes};
    const Image taps = group_image(work.other_planes[0].data, stride, rows.taps, cols.taps, kLanes, RK_F32, 0, 0);
    image_rows(job.transforms.plain_cols, work.planes, &taps, 1, 0, 0, rows.taps, cols.taps, job.plan.scale, nullptr,
               false, work);
}

static void write_taps(const Plan& plan, const Image& weight, const float* taps) {
    const Axis &rows = plan.rows, &cols = plan.cols;
    const bool dilated = rows.dilation > 1 || cols.dilation > 1;
    if (dilated || rows.taps < weight.rows || cols.taps < weight.cols)  // the other taps touch no input
        memset(weight.data, 0, weight.channels * weight.c * sizeof(float));
    if (!dilated) {
        write_tile(weight, rows.first_tap, cols.first_tap, rows.taps, cols.taps, taps, cols.taps * kLanes, Vec{}, false);
        return;
    }
    for (int64_t kh = 0; kh < weight.rows; kh++)
        for (int64_t kw = 0; kw < weight.cols; kw++) {
            const int64_t row = kh * rows.dilation - rows.first_tap, col = kw * cols.dilation - cols.first_tap;
            if (row >= 0 && row < rows.taps && col >= 0 && col < cols.taps)
                write_tile(weight, kh, kw, 1, 1, taps + (row * cols.taps + col) * kLanes, 0, Vec{}, false);
        }
}

// The sums of spectra over tiles [begin, end) of the images of some groups.
static void correlate_tiles(const Job& job, int64_t first, int block, int64_t begin, int64_t end, const Workspace& work) {
    clear(work.spectrum, block * job.plan.spectrum_floats() / kLanes);
    for (int64_t tile = begin; tile < end; tile++)
        correlate_tile(job, first, block, tile / job.plan.tiles, tile % job.plan.tiles, work);
}

static void correlate_by_groups(const Job& job) {
    const Plan& plan = job.plan;
#pragma omp parallel num_threads(job.problem.threads)
    {
        const Workspace work = job.workspace(omp_get_thread_num());
#pragma omp for schedule(static)
        for (int line = 0; line < plan.lines; line++) {
            const int first = plan.first_group(line), block = plan.first_group(line + 1) - first;
            correlate_tiles(job, first, block, 0, plan.images * plan.tiles, work);
            for (int g = 0; g < block; g++) {
                gradient_taps(job, work.spectrum + g * plan.spectrum_floats(), work);
                write_taps(plan, job.weight(first + g), work.other_planes[0].data);
            }
        }
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
            correlate_tiles(job, group, 1, tiles * chunk / chunks, tiles * (chunk + 1) / chunks, work);
            gradient_taps(job, work.spectrum, work);
        }
#pragma omp for schedule(static)
        for (int group = 0; group < plan.groups; group++) {
            float* sum = job.workspace(group * chunks).other_planes[0].data;
            for (int64_t chunk = 1; chunk < chunks; chunk++) {
                const float* part = job.workspace(group * chunks + chunk).other_planes[0].data;
                for (int64_t i = 0; i < plan.rows.taps * plan.cols.taps; i++)
                    store(sum + i * kLanes, load(sum + i * kLanes) + load(part + i * kLanes));
            }
            write_taps(plan, job.weight(group), sum);
        }
    }
}

static void correlate(const Call& call) {
    const Job job(call);
    const int64_t chunks = least(job.plan.images * job.plan.tiles, job.problem.threads / job.plan.groups);
    if (chunks > 1)
        correlate_by_images(job, chunks);
    else
        correlate_by_groups(job);
}

}  // namespace RK_ISA::spectral

// Weight gradient: the columns of input and output gradient are transformed and their product is summed over images
// and tiles; each group of channels then needs one inverse.
#pragma once

#include "fft_job.h"

namespace RK_ISA::spectral {

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

static void correlate(const Call& call) {
    const Job job(call);
    const int64_t chunks = least(job.plan.images * job.plan.tiles, job.problem.threads / job.plan.groups);
    if (chunks > 1)
        correlate_by_images(job, chunks);
    else
        correlate_by_groups(job);
}

}  // namespace RK_ISA::spectral

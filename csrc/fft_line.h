// Groups that share cache lines, where planes for all of them would outgrow the cache: each is convolved by itself, but all are
// read with the first and written with the last.
#pragma once

#include "fft_columns.h"

namespace RK_ISA::spectral {

static void convolve_line(const Job& job, int64_t first, int groups, int64_t image, int64_t tile, const float* spectra,
                          const Workspace& work) {
    const Plan& plan = job.plan;
    const Transform &entering = job.transforms.data_cols, &leaving = job.transforms.plain_cols;
    const Tile t = tile_of(job, first, groups, image, tile);
    const Plane& plane = work.planes[0];
    const int64_t cols = plan.cols.window, pitch = (cols + 1) * kLanes, out_pitch = (t.width + 1) * kLanes;
    const Offsets offsets(entering, cols, kLanes), out_offsets(leaving, t.width, kLanes);
    const auto input_at = [&](int g, int64_t r) {
        return g ? work.kept_inputs + ((g - 1) * plan.rows.window + r) * pitch : work.lines;
    };
    const auto output_at = [&](int g, int64_t r) {
        return g + 1 < groups ? work.kept_outputs + (g * t.height + r) * out_pitch : work.lines;
    };
    const auto [begin, end] = rows_inside(t.in[0], t.row, plan.rows.window);
    for (int g = 0; g < groups; g++) {
        clear_around(plane, plan.bins, begin, end);
        for (int64_t r = begin; r < end; r += 2) {
            const int64_t second = least(r + 1, end - 1) - r;
            if (g == 0) {
                float* kept[kLineGroups];
                for (int other = 0; other < groups; other++) {
                    kept[other] = input_at(other, r);
                    for (int64_t i = 0; i <= second; i++) clear(kept[other] + i * pitch + cols * kLanes, 1);
                }
                read_tiles(t.in, groups, t.row + r, t.col, second + 1, cols, kept, pitch);
            }
            transform_rows(entering, {plane, r, second, input_at(g, r), pitch, offsets}, work);
        }
        if (!spectra) filter_rows(job, first + g, work.spectrum, work);
        convolve_columns(job, plane, end, t.height, spectra ? spectra + g * plan.spectrum_floats() : nullptr, work);
        for (int64_t r = 0; r < t.height; r += 2) {
            const int64_t second = least(r + 1, t.height - 1) - r;
            restore_rows(leaving, {plane, r, second, output_at(g, r), out_pitch, out_offsets}, plan.scale, {}, work);
            if (g + 1 == groups) {
                float* kept[kLineGroups];
                for (int other = 0; other < groups; other++) kept[other] = output_at(other, r);
                write_tiles(t.out, groups, t.out_row + r, t.out_col, second + 1, t.width, kept, out_pitch, job.call.bias,
                            job.problem.relu);
            }
        }
    }
}

}  // namespace RK_ISA::spectral

// Forward pass and input gradient: each column of a plane is transformed, multiplied by the filter's spectrum and
// transformed back.
#pragma once

#include "fft_job.h"

namespace RK_ISA::spectral {

// The rows of a group's filter, transformed, in the other plane. Its taps fit in the memory of a spectrum.
static void filter_rows(const Job& job, int64_t group, float* taps, const Workspace& work) {
    read_kernel(job.plan, job.weight(group), taps, work.lines);
    kernel_rows(job.transforms.kernel_cols, job.plan, taps, work.other_planes[0], work);
}

static void filter_spectrum(const Job& job, int64_t group, float* spectrum, const Workspace& work) {
    const Transform& t = job.transforms.kernel_rows;
    const Offsets taps(t, job.plan.rows.taps, kComplex);
    filter_rows(job, group, spectrum, work);
    for (int bin = 0; bin < job.plan.bins; bin++, spectrum += t.size() * kComplex) {
        forward_outer(t, work.other_planes[0].column(bin, taps), work.scratch);
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
            forward_outer(t.kernel_rows, work.other_planes[0].column(bin, taps), work.other_scratch);
            kInner.product[inner](work.scratch, outer, work.other_scratch);
        }
        inverse_outer(t.plain_rows, work.scratch, plane.column(bin, wanted));
    }
}

}  // namespace RK_ISA::spectral

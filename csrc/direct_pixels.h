// Small filters on tensors whose channels are adjacent (NHWC): the map is read and written where it lies, see
// direct_patches.h.
//
// Workspace of one thread: the filters, which all threads share in that of the first; at most 2 MiB.
#pragma once

#include <omp.h>

#include "direct_patches.h"
#include "direct_plan.h"

namespace RK_ISA {
namespace direct {

constexpr size_t kFiltersBytes = 2 << 20;  // at most
constexpr int64_t kShareChannels = 64;      // at least: threads that write neighbouring lines wait for each other

static size_t pixels_workspace(const rk_problem& p) {
    return group_count(p.channels) * filter_floats(p) * sizeof(float);
}

static bool suits_pixels(const rk_problem& p) {
    const int taps = p.kernel_w, most_taps = p.stride_w == 1 ? 11 : 9;
    const bool forward = p.pass == RK_FORWARD, by_two = p.stride_w == 2 && forward;
    // packed copies are faster where maps are in the caches or many patches meet their borders
    const bool in_place = taps == 3 || taps == 5 || by_two || (outgrows_caches(p) && p.in_w >= 5 * taps);
    return (forward || p.pass == RK_GRAD_INPUT) && taps % 2 == 1 && taps >= 3 && taps <= most_taps && p.kernel_h == taps &&
           in_place && p.dtype == RK_F32 && (p.stride_w == 1 || by_two) && p.stride_h == p.stride_w &&
           p.dilation_h == 1 && p.dilation_w == 1 && p.input_stride[1] == 1 && p.output_stride[1] == 1 &&
           p.channels >= kLanes && pixels_workspace(p) <= kFiltersBytes;
}

// The filters of a group of channels tap by tap, as `read_filter` writes them.
static void read_filters(const rk_problem& p, const float* weight, int64_t first, float* filters) {
    if (first % kLanes == 0) return read_filter(p, weight, first / kLanes, filters);
    const int64_t taps = int64_t(p.kernel_h) * p.kernel_w;
    for (int64_t lane = 0; lane < kLanes; lane++) {
        const Image image = filter_image(p, weight, (first + lane) / kLanes);
        const float* filter = reinterpret_cast<const float*>(image.data) + (first + lane) % kLanes * image.c;
        for (int64_t tap = 0; tap < taps; tap++) filters[tap * kLanes + lane] = filter[tap * image.w];
    }
    if (p.pass == RK_GRAD_INPUT) flip(filters, taps);
}

static Pixels pixels_of(const Call& call, const float* filters, int64_t n) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    float* const input = static_cast<float*>(call.input) + n * p.input_stride[0];
    float* const output = static_cast<float*>(call.output) + n * p.output_stride[0];
    const int64_t* x_stride = flipped ? p.output_stride : p.input_stride;
    const int64_t* y_stride = flipped ? p.input_stride : p.output_stride;
    Pixels pixels;
    pixels.x = flipped ? output : input;
    pixels.x_pitch = x_stride[2];
    pixels.x_step = x_stride[3];
    pixels.x_rows = int(flipped ? p.out_h : p.in_h);
    pixels.x_cols = int(flipped ? p.out_w : p.in_w);
    pixels.w = filters;
    pixels.pad_top = flipped ? p.kernel_h - 1 - p.pad_top : p.pad_top;
    pixels.pad_left = flipped ? p.kernel_w - 1 - p.pad_left : p.pad_left;
    pixels.y = flipped ? input : output;
    pixels.y_pitch = y_stride[2];
    pixels.y_step = y_stride[3];
    pixels.bias = call.bias;
    pixels.relu = p.relu;
    pixels.channels = p.channels;
    pixels.fetch = outgrows_caches(p);
    return pixels;
}

// Parts of an image for every thread to have work: of its groups and of its rows of patches.
struct Parts {
    int64_t groups, rows;
};

// Large images are split by rows first, as whole pixels are read and written faster.
static Parts parts_of(const rk_problem& p, int64_t patches) {
    const int64_t wanted = divide_up(4 * p.threads, p.batch), most_groups = at_least(1, p.channels / kShareChannels);
    if (outgrows_caches(p)) {
        const int64_t rows = at_most(wanted, patches);
        return {at_most(divide_up(wanted, rows), most_groups), rows};
    }
    const int64_t groups = at_most(wanted, most_groups);
    return {groups, at_most(divide_up(wanted, groups), patches)};
}

template <int K, int S>
static void run_pixels(const Call& call) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int64_t groups = group_count(p.channels), rows = flipped ? p.in_h : p.out_h, cols = flipped ? p.in_w : p.out_w;
    const int64_t patches = divide_up(rows, patch_rows(K));
    const Parts parts = parts_of(p, patches);
    const int64_t jobs = p.batch * parts.rows * parts.groups;
    float* const filters = reinterpret_cast<float*>(call.workspace);
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t group = groups * thread / threads; group < groups * (thread + 1) / threads; group++)
            read_filters(p, call.weight, first_channel(p.channels, group), filters + group * filter_floats(p));
#pragma omp barrier
        for (int64_t i = jobs * thread / threads; i < jobs * (thread + 1) / threads; i++) {
            const int64_t part = i % parts.groups, band = i / parts.groups % parts.rows, n = i / parts.groups / parts.rows;
            const int64_t first_row = patches * band / parts.rows * patch_rows(K);
            const int64_t last_row = at_most(rows, patches * (band + 1) / parts.rows * patch_rows(K));
            const Share share = {groups * part / parts.groups, groups * (part + 1) / parts.groups, int(first_row), int(last_row)};
            correlate_pixels<K, S>(pixels_of(call, filters, n), share, int(cols));
        }
    }
}

static void run_pixels(const Call& call) {
    static constexpr void (*kernels[][2])(const Call&) = {{run_pixels<3, 1>, run_pixels<3, 2>},
                                                          {run_pixels<5, 1>, run_pixels<5, 2>},
                                                          {run_pixels<7, 1>, run_pixels<7, 2>},
                                                          {run_pixels<9, 1>, run_pixels<9, 2>},
                                                          {run_pixels<11, 1>, nullptr}};
    kernels[call.problem->kernel_w / 2 - 1][call.problem->stride_w - 1](call);
}

}  // namespace direct
}  // namespace RK_ISA

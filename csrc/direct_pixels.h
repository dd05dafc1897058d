// Small filters on tensors whose channels are adjacent (NHWC): the map is read and written where it lies, in strips of
// columns. All groups of channels go down a strip before the next strip: the pages of memory in use are few.
#pragma once

#include <omp.h>

#include "direct_plan.h"

namespace RK_ISA {
namespace direct {

constexpr int64_t kBandRows = 16;  // at least: the rows at its borders are read twice

static bool suits_pixels(const rk_problem& p) {
    const bool forward = p.pass == RK_FORWARD, by_two = p.stride_w == 2 && forward;
    // 7 rows of outputs are too many for maps in the caches: those beyond the borders count
    const bool small = p.kernel_w == 3 || p.kernel_w == 5 || (p.kernel_w == 7 && (by_two || outgrows_caches(p)));
    return (forward || p.pass == RK_GRAD_INPUT) && small && p.kernel_h == p.kernel_w && p.dtype == RK_F32 &&
           (p.stride_w == 1 || by_two) && p.stride_h == p.stride_w && p.dilation_h == 1 && p.dilation_w == 1 &&
           p.input_stride[1] == 1 && p.output_stride[1] == 1 && p.channels >= kLanes;
}

// The last group of channels overlaps the one before it where their number is no multiple of kLanes.
static int64_t first_channel(const rk_problem& p, int64_t group) {
    return at_most(group * kLanes, p.channels - kLanes);
}

// Filters of each thread: of the groups whose number has its remainder.
static int64_t groups_of_thread(const rk_problem& p) { return divide_up(group_count(p.channels), p.threads); }

static size_t pixels_workspace(const rk_problem& p) { return groups_of_thread(p) * filter_floats(p) * sizeof(float); }

static float* filter_of(const Call& call, int64_t group) {
    const rk_problem& p = *call.problem;
    char* const workspace = call.workspace + group % p.threads * call.workspace_stride;
    return reinterpret_cast<float*>(workspace) + group / p.threads * filter_floats(p);
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

static Correlation channels_of(const Call& call, int64_t n, int64_t group) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int64_t first = first_channel(p, group);
    float* const input = static_cast<float*>(call.input) + n * p.input_stride[0] + first;
    float* const output = static_cast<float*>(call.output) + n * p.output_stride[0] + first;
    const int64_t* x_stride = flipped ? p.output_stride : p.input_stride;
    const int64_t* y_stride = flipped ? p.input_stride : p.output_stride;
    Correlation c;
    c.x = flipped ? output : input;
    c.x_pitch = x_stride[2];
    c.x_step = x_stride[3];
    c.x_rows = int(flipped ? p.out_h : p.in_h);
    c.x_cols = int(flipped ? p.out_w : p.in_w);
    c.w = filter_of(call, group);
    c.pad_top = flipped ? p.kernel_h - 1 - p.pad_top : p.pad_top;
    c.pad_left = flipped ? p.kernel_w - 1 - p.pad_left : p.pad_left;
    c.y = flipped ? input : output;
    c.y_pitch = y_stride[2];
    c.y_step = y_stride[3];
    c.start = call.bias ? load(call.bias + first) : Vec{};
    c.relu = p.relu;
    c.fetch = outgrows_caches(p) && group % (kLine / kLanes) == 0;
    return c;
}

template <int K, int S>
static void run_pixels(const Call& call) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int64_t height = flipped ? p.in_h : p.out_h, groups = group_count(p.channels);
    const Split columns(int(flipped ? p.in_w : p.out_w), strip_columns(K, S));
    // work for every thread: bands of rows first, as two threads that share pixels wait for each other's pages
    const int64_t strips = p.batch * columns.parts, wanted = divide_up(4 * p.threads, strips);
    const int64_t bands = at_least(1, at_most(wanted, height / kBandRows));
    const int64_t parts = at_most(groups, divide_up(wanted, bands)), jobs = strips * bands * parts;
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t group = thread; group < groups; group += threads)
            read_filters(p, call.weight, first_channel(p, group), filter_of(call, group));
#pragma omp barrier
        for (int64_t i = jobs * thread / threads; i < jobs * (thread + 1) / threads; i++) {
            const int64_t part = i % parts, block = i / parts % columns.parts, band = i / parts / columns.parts % bands;
            const int64_t n = i / parts / columns.parts / bands;
            const int col = columns.begin(int(block)), width = columns.end(int(block)) - col;
            for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; group++)
                correlate_columns<K, S>(channels_of(call, n, group), col, width, int(height * band / bands),
                                        int(height * (band + 1) / bands));
        }
    }
}

static void run_pixels(const Call& call) {
    static constexpr void (*kernels[][2])(const Call&) = {{run_pixels<3, 1>, run_pixels<3, 2>},
                                                          {run_pixels<5, 1>, run_pixels<5, 2>},
                                                          {run_pixels<7, 1>, run_pixels<7, 2>}};
    kernels[call.problem->kernel_w / 2 - 1][call.problem->stride_w - 1](call);
}

}  // namespace direct
}  // namespace RK_ISA

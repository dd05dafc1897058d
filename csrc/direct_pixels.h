// Small filters on tensors whose channels are adjacent (NHWC): lanes over channels, the map is read and written where it
// lies.
//
// A strip of T columns runs down the map. The sums of all rows of outputs that an input row reaches are in registers, so
// that each input is loaded once. All groups of channels go down a strip before the next strip: the pages of memory in
// use are few. Each output is one sum.
#pragma once

#include <omp.h>

#include "direct_plan.h"

namespace RK_ISA {
namespace direct {

constexpr int rows_reached(int taps, int stride) { return (taps + stride - 1) / stride; }

// Sums in registers, beside inputs and taps; with more GCC spills.
constexpr int kPixelSums = kSums > 21 ? 21 : kSums;

// Most columns of a strip.
constexpr int kMaxPixels = 8;
constexpr int pixels_at_once(int taps, int stride) {
    const int fit = kPixelSums / rows_reached(taps, stride);
    return fit < kMaxPixels ? fit : kMaxPixels;
}

constexpr int kRowsAhead = 6;      // from the row in use to the one that is fetched where images outgrow the caches
constexpr int64_t kBandRows = 16;  // at least: the rows at its borders are read twice

// One group of channels of a map, and its filter, tap by tap; columns and rows of x that do not exist are left out.
struct Channels {
    const float* x;
    int64_t x_pitch, x_step;
    int x_rows, x_cols;
    const float* w;
    int pad_top, pad_left;
    float* y;
    int64_t y_pitch, y_step;
    Vec bias;
    bool relu, fetch;
};

template <int Count>
static RK_INLINE void fetch_pixels(const float* pixel, int64_t step) {
#pragma GCC unroll 32
    for (int i = 0; i < Count; i++) __builtin_prefetch(pixel + i * step + kLine - 1, 0, 2);
}

// Adds row `row` of x, which is at `x` from column `left` on, to the sums of the rows of outputs that it reaches: the
// last of them by row `First` of the taps, each before it by the taps S rows further down. Edge: some columns do not
// exist.
template <bool Edge, int K, int S, int T, int First>
static RK_INLINE void add_pixels(const Channels& c, const float* x, int row, int left,
                                 Vec (&sum)[rows_reached(K, S)][T]) {
    constexpr int kCount = (T - 1) * S + K, kRows = rows_reached(K, S);
    if (c.fetch) fetch_pixels<kCount>(x + kRowsAhead * c.x_pitch, c.x_step);
    if (row < 0 || row >= c.x_rows) return;
#pragma GCC unroll 32
    for (int j = 0; j < kCount; j++) {
        if (Edge && (left + j < 0 || left + j >= c.x_cols)) continue;
        const Vec v = load(x + j * c.x_step);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
            for (int l = 0; l < K; l++) {
                const int k = First + (kRows - 1 - i) * S, t = (j - l) / S;
                if (k < K && j >= l && (j - l) % S == 0 && t < T) sum[i][t] += load(c.w + (k * K + l) * kLanes) * v;
            }
    }
}

// T columns of outputs from `col`, in the rows from `begin` to before `end`.
template <bool Edge, int K, int S, int T>
static void convolve_pixels(const Channels& c, int col, int begin, int end) {
    constexpr int kRows = rows_reached(K, S);
    const int left = col * S - c.pad_left;
    const float* x = c.x + (begin * S - c.pad_top) * c.x_pitch + left * c.x_step;
    float* y = c.y + (begin - kRows + 1) * c.y_pitch + col * c.y_step;
    Vec sum[kRows][T] = {};
    for (int row = begin; row < end + kRows - 1; row++, x += S * c.x_pitch, y += c.y_pitch) {
        add_pixels<Edge, K, S, T, 0>(c, x, row * S - c.pad_top, left, sum);
        if constexpr (S == 2) add_pixels<Edge, K, S, T, 1>(c, x + c.x_pitch, row * S + 1 - c.pad_top, left, sum);
        if (row >= begin + kRows - 1) {
            if (c.fetch) fetch_pixels<T>(y + kRowsAhead * c.y_pitch, c.y_step);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) store(y + t * c.y_step, finish(sum[0][t], c.bias, c.relu));
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) sum[i][t] = i < kRows - 1 ? sum[i + 1][t] : Vec{};
    }
}

typedef void (*PixelsKernel)(const Channels&, int col, int begin, int end);

template <bool Edge, int K, int S, int T>
static constexpr PixelsKernel pixels_kernel() {
    if constexpr (T <= pixels_at_once(K, S))
        return convolve_pixels<Edge, K, S, T>;
    else
        return nullptr;
}

template <int K, int S, class Widths = Indices<1, 2, 3, 4, 5, 6, 7, 8>>
struct PixelsKernels;

template <int K, int S, int... T>
struct PixelsKernels<K, S, Indices<T...>> {
    static constexpr PixelsKernel table[2][kMaxPixels] = {{pixels_kernel<false, K, S, T>()...},
                                                          {pixels_kernel<true, K, S, T>()...}};
};

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

// Writes the filters of a group of channels tap by tap, for an input gradient from the last to the first.
static void read_filters(const rk_problem& p, const float* weight, int64_t first, float* filters) {
    const int64_t taps = int64_t(p.kernel_h) * p.kernel_w;
    if (first % kLanes == 0)
        read_tile(filter_image(p, weight, first / kLanes), 0, 0, p.kernel_h, p.kernel_w, filters, p.kernel_w * kLanes);
    else
        for (int64_t lane = 0; lane < kLanes; lane++) {
            const Image image = filter_image(p, weight, (first + lane) / kLanes);
            const float* filter = reinterpret_cast<const float*>(image.data) + (first + lane) % kLanes * image.c;
            for (int64_t tap = 0; tap < taps; tap++) filters[tap * kLanes + lane] = filter[tap * image.w];
        }
    if (p.pass == RK_GRAD_INPUT)
        for (int64_t tap = 0, last = taps - 1; tap < last; tap++, last--) {
            const Vec v = load(filters + tap * kLanes);
            store(filters + tap * kLanes, load(filters + last * kLanes));
            store(filters + last * kLanes, v);
        }
}

static Channels channels_of(const Call& call, int64_t n, int64_t group) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int64_t first = first_channel(p, group);
    float* const input = static_cast<float*>(call.input) + n * p.input_stride[0] + first;
    float* const output = static_cast<float*>(call.output) + n * p.output_stride[0] + first;
    const int64_t* x_stride = flipped ? p.output_stride : p.input_stride;
    const int64_t* y_stride = flipped ? p.input_stride : p.output_stride;
    Channels c;
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
    c.bias = call.bias ? load(call.bias + first) : Vec{};
    c.relu = p.relu;
    c.fetch = outgrows_caches(p) && group % (kLine / kLanes) == 0;
    return c;
}

template <int K, int S>
static void run_pixels(const Call& call) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int64_t height = flipped ? p.in_h : p.out_h, groups = group_count(p.channels);
    const int x_cols = int(flipped ? p.out_w : p.in_w), pad_left = flipped ? K - 1 - p.pad_left : p.pad_left;
    const Split columns(int(flipped ? p.in_w : p.out_w), pixels_at_once(K, S));
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
            const int left = col * S - pad_left;
            const bool edge = left < 0 || left + (width - 1) * S + K > x_cols;
            const PixelsKernel convolve = PixelsKernels<K, S>::table[edge][width - 1];
            for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; group++)
                convolve(channels_of(call, n, group), col, int(height * band / bands), int(height * (band + 1) / bands));
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

// Small filters on tensors whose channels are adjacent (NHWC): lanes over channels, the map is read and written where it
// lies.
//
// A block of a few columns and rows goes through all its channels before the next one, so that each of its cache lines
// comes once and is used whole. Images that outgrow the caches are read in the order of the memory by 3x3 filters:
// blocks of one row, while the next row comes into the second level cache. Larger filters use each input so often that
// blocks of many rows, whose inputs stay in the first level cache, are faster. Each output is one sum.
#pragma once

#include <omp.h>

#include "direct_plan.h"

namespace RK_ISA {
namespace direct {

constexpr int64_t kBlockChannels = 256, kBlockBytes = 128 << 10, kWindowBytes = 192 << 10;

// Groups of channels that a row of outputs is computed for, before the next row: as many as keep inputs and filters in
// the first level cache, at least those that share a cache line.
constexpr int groups_at_once(int taps) { return (taps == 3 ? 128 : int(kLine)) / kLanes; }

// One group of channels of a map, and its filters; columns and rows of x that do not exist are left out.
struct Channels {
    const float* x;
    int64_t x_pitch, x_step;
    int x_rows, x_cols;
    const float* w;
    int64_t w_step;  // negative for flipped filters
    int pad_top, pad_left;
    float* y;
    int64_t y_pitch, y_step;
    Vec bias;
    bool relu;
};

// A row of outputs, T columns from `col`. Edge: some columns of x do not exist.
template <bool Edge, int K, int S, int T>
static void convolve_columns(const Channels& c, int row, int col) {
    const int first = c.pad_left - col * S, last = c.x_cols + first;
    const int top = row * S - c.pad_top, from = larger(0, -top), to = smaller(K, c.x_rows - top);
    const float *x = c.x + (top + from) * c.x_pitch - first * c.x_step, *w = c.w + from * K * c.w_step;
    Vec sum[1][T] = {};
    for (int k = from; k < to; k++, x += c.x_pitch, w += K * c.w_step)
        add_row<Edge, K, T, S>(x, c.x_step, w, c.w_step, first, last, sum);
    float* const y = c.y + row * c.y_pitch + col * c.y_step;
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) store(y + t * c.y_step, finish(sum[0][t], c.bias, c.relu));
}

typedef void (*ColumnsKernel)(const Channels&, int row, int col);

template <bool Edge, int K, int S, int T>
static constexpr ColumnsKernel columns_kernel() {
    if constexpr (T <= cols_at_once(K))
        return convolve_columns<Edge, K, S, T>;
    else
        return nullptr;
}

template <int K, int S, class Widths = Indices<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>>
struct ColumnsKernels;

template <int K, int S, int... T>
struct ColumnsKernels<K, S, Indices<T...>> {
    static constexpr ColumnsKernel table[2][kMaxCols] = {{columns_kernel<false, K, S, T>()...},
                                                         {columns_kernel<true, K, S, T>()...}};
};

static bool suits_pixels(const rk_problem& p) {
    const bool forward = p.pass == RK_FORWARD;
    return (forward || p.pass == RK_GRAD_INPUT) && p.kernel_h == p.kernel_w && p.dtype == RK_F32 &&
           p.stride_h == p.stride_w && (p.stride_w == 1 || (p.stride_w == 2 && forward)) && p.dilation_h == 1 &&
           p.dilation_w == 1 && p.input_stride[1] == 1 && p.output_stride[1] == 1 && p.channels >= kLanes &&
           reads_in_place(p.kernel_w, forward ? p.input_stride[3] : p.output_stride[3]);
}

// The last group of channels overlaps the one before it where their number is no multiple of kLanes.
static int64_t first_channel(const rk_problem& p, int64_t group) {
    return at_most(group * kLanes, p.channels - kLanes);
}

static int64_t channels_at_once(const rk_problem& p) {
    return at_most(group_count(p.channels) * kLanes, kBlockChannels);
}

static size_t pixels_workspace(const rk_problem& p) {
    return channels_at_once(p) * p.kernel_h * p.kernel_w * sizeof(float);
}

// The filters of a group of channels from `first` on, tap by tap.
static void read_filters(const rk_problem& p, const float* weight, int64_t first, float* filters) {
    if (first % kLanes == 0)
        return read_tile(filter_image(p, weight, first / kLanes), 0, 0, p.kernel_h, p.kernel_w, filters,
                         p.kernel_w * kLanes);
    for (int64_t lane = 0; lane < kLanes; lane++) {
        const Image image = filter_image(p, weight, (first + lane) / kLanes);
        const float* filter = reinterpret_cast<const float*>(image.data) + (first + lane) % kLanes * image.c;
        for (int64_t tap = 0; tap < p.kernel_h * p.kernel_w; tap++) filters[tap * kLanes + lane] = filter[tap * image.w];
    }
}

static Channels channels_of(const Call& call, int64_t n, int64_t first, const float* filters) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
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
    c.w = flipped ? filters + (p.kernel_h * p.kernel_w - 1) * kLanes : filters;
    c.w_step = flipped ? -kLanes : kLanes;
    c.pad_top = flipped ? p.kernel_h - 1 - p.pad_top : p.pad_top;
    c.pad_left = flipped ? p.kernel_w - 1 - p.pad_left : p.pad_left;
    c.y = flipped ? input : output;
    c.y_pitch = y_stride[2];
    c.y_step = y_stride[3];
    c.bias = call.bias ? load(call.bias + first) : Vec{};
    c.relu = p.relu;
    return c;
}

struct Rows {
    int begin, end;
};

static RK_INLINE void fetch_pixels(const float* pixel, int64_t step, int count, int floats) {
    for (int i = 0; i < count; i++, pixel += step)
        for (int c = 0; c < floats; c += int(kLine)) __builtin_prefetch(pixel + c, 0, 2);
}

// Brings what the next row of outputs reads and writes into the second level cache.
template <int K, int S>
static RK_INLINE void fetch_next_row(const Channels& c, int count, int row, int col, int width) {
    const int next = row + 1, floats = count * kLanes, x_col = col * S - c.pad_left + K / 2;
    for (int i = 0; i < S; i++) {
        const int x_row = next * S - c.pad_top + K - 1 - i;
        fetch_pixels(c.x + x_row * c.x_pitch + x_col * c.x_step, c.x_step, width * S, floats);
    }
    fetch_pixels(c.y + next * c.y_pitch + col * c.y_step, c.y_step, width, floats);
}

// Outputs of some rows and columns for some groups.
template <int K, int S>
static RK_INLINE void convolve_block(const Channels* groups, int count, Rows rows, int col, int width, bool fetch) {
    const Channels& c = groups[0];
    const int left = col * S - c.pad_left, next = left + (width - 1) * S + K;
    const ColumnsKernel convolve = ColumnsKernels<K, S>::table[left < 0 || next > c.x_cols][width - 1];
    for (int row = rows.begin; row < rows.end; row++) {
        if (fetch) fetch_next_row<K, S>(c, count, row, col, width);
        for (int i = 0; i < count; i++) convolve(groups[i], row, col);
    }
}

template <int K, int S>
static void run_pixels(const Call& call) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int64_t height = flipped ? p.in_h : p.out_h, channels = channels_at_once(p);
    const int64_t groups = group_count(p.channels), parts = divide_up(groups * kLanes, kBlockChannels);
    const Split columns(int(flipped ? p.in_w : p.out_w), cols_at_once(K));
    const int64_t line = (cols_at_once(K) * S + K) * channels * int64_t(sizeof(float));
    const bool by_rows = K == 3 && outgrows_caches(p);
    // by rows: as many columns as keep the rows of a window in the second level cache
    const Split chunks(columns.parts, by_rows ? int(at_least(1, kWindowBytes / (K * line))) : columns.parts);
    const int64_t most = by_rows ? height : at_least(2, (kBlockBytes / line - K) / S);
    const int64_t wanted = divide_up(2 * p.threads, parts * p.batch * chunks.parts);
    const int64_t bands = at_least(divide_up(height, most), at_most(wanted, height)), pieces = bands * chunks.parts;
    const int64_t jobs = parts * p.batch * pieces;
    // small maps: keep the filters for all images; large ones: no two threads in the same pixels
    const bool part_first = height * columns.size <= 256;
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float* const filters = reinterpret_cast<float*>(call.workspace + thread * call.workspace_stride);
        int64_t read = -1;
        for (int64_t i = jobs * thread / threads; i < jobs * (thread + 1) / threads; i++) {
            const int64_t part = part_first ? i / (p.batch * pieces) : i % parts;
            const int64_t place = part_first ? i % (p.batch * pieces) : i / parts;
            const int64_t n = place / pieces, band = place % pieces / chunks.parts;
            const int chunk = int(place % chunks.parts);
            const int64_t begin = groups * part / parts, end = groups * (part + 1) / parts;
            const auto filter = [&](int64_t group) { return filters + (group - begin) * K * K * kLanes; };
            for (int64_t group = begin; group < end && read != part; group++)
                read_filters(p, call.weight, first_channel(p, group), filter(group));
            read = part;
            const Rows rows = {int(height * band / bands), int(height * (band + 1) / bands)};
            Channels all[kBlockChannels / kLanes];
            for (int64_t group = begin; group < end; group++)
                all[group - begin] = channels_of(call, n, first_channel(p, group), filter(group));
            const int count = int(end - begin), at_once = by_rows ? count : groups_at_once(K);
            const int step = by_rows ? 1 : rows.end - rows.begin;
            for (int row = rows.begin; row < rows.end; row += step)
                for (int block = chunks.begin(chunk); block < chunks.end(chunk); block++) {
                    const int col = columns.begin(block), width = columns.end(block) - col;
                    for (int first = 0; first < count; first += at_once)
                        convolve_block<K, S>(all + first, smaller(at_once, count - first), {row, row + step}, col, width,
                                             by_rows);
                }
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

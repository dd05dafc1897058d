// Small filters on tensors whose columns are adjacent (NCHW): lanes over columns, nothing is packed or transposed.
//
// A strip of T vectors of columns runs down the map. The sums of the K rows of outputs that an input row reaches are in
// registers; each input row is loaded once for each of the K columns of taps. Strips read memory in short pieces, too
// short for the processor to foresee, so each brings its part of what follows into the second level cache.
#pragma once

#include <omp.h>

#include "direct_plan.h"

namespace RK_ISA {
namespace direct {

// One map, one filter; flipped filters have negative steps. Columns of x that do not exist count as zeros, rows are
// left out.
struct Plane {
    const float* x;
    int64_t x_pitch;
    int x_rows, x_cols;
    const float* w;
    int w_pitch, w_step;
    int pad_top, pad_left;
    float* y;
    int64_t y_pitch;
    int y_rows, y_cols;
    float bias;
    bool relu;
    const float *next_x, *next_y;  // the rows to fetch, or null
};

constexpr int64_t kPieceBytes = 64 << 10;    // of a band of rows, fetched while the one before it is computed
constexpr int64_t kForeseenBytes = 4 << 10;  // the processor fetches what follows so little by itself
constexpr int64_t kForeseenMaps = 12 << 20;  // outputs of all maps: beyond, even small maps are fetched; measured
constexpr int kMaxStrip = 4;

#if RK_LANES == 16  // 32 vector registers
constexpr int strip_of(int taps) { return taps == 7 ? 3 : 4; }
#else
constexpr int strip_of(int taps) { return taps == 7 ? 1 : taps == 5 ? 2 : 3; }
#endif

// Maps of fewer columns are faster in tiles of packed channels; measured. Without masked loads all are.
constexpr int64_t fewest_columns(int taps, int64_t channels) {
    if (kLanes == 16) return 12;
    if (2 * channels <= kLanes) return kLanes;  // tiles have as many idle lanes
    return taps == 7 ? 256 : taps == 5 ? 24 : 14;
}

// Brings T vectors of columns of a row that follows into the second level cache.
template <int T>
static RK_INLINE void fetch_strip(const Plane& p, int row, int col) {
    for (int c = col; c < col + T * kLanes; c += int(kLine)) {
        __builtin_prefetch(p.next_x + row * p.x_pitch + c, 0, 2);
        __builtin_prefetch(p.next_y + row * p.y_pitch + c, 1, 2);
    }
}

// Outputs of T vectors of columns from `col`, in the rows from `begin` to before `end`. The last vector overlaps the one
// before it rather than leaving the map, where it can: masked stores are slow. Edge: some columns of x do not exist.
template <int K, int T, bool Edge>
static void convolve_strip(const Plane& given, const float* taps, int col, int begin, int end) {
    const Plane p = given;  // a store might change what is given
    Vec sum[K][T] = {};
    Mask exist[K][T];
    const int last = larger(smaller(p.y_cols - kLanes, col + (T - 1) * kLanes), 0) - col;
    const auto start = [&](int t) { return t == T - 1 ? last : t * kLanes; };
    if (Edge)
        for (int l = 0; l < K; l++)
            for (int t = 0; t < T; t++) {
                const int first = p.pad_left - l - col - start(t);
                exist[l][t] = lanes_between(smaller(larger(first, 0), kLanes),
                                            smaller(larger(first + p.x_cols, 0), kLanes));
            }
    const Vec bias = broadcast(p.bias);
    const int last_lanes = smaller(p.y_cols, kLanes);
    const float* x = p.x + (begin - p.pad_top) * p.x_pitch + col - p.pad_left;
    float* y = p.y + (begin - K + 1) * p.y_pitch + col;
    for (int i = begin; i < end + K - 1; i++, x += p.x_pitch, y += p.y_pitch) {
        const int row = i - p.pad_top;
        if (p.next_x) fetch_strip<T>(p, i - begin, col);
        if (row >= 0 && row < p.x_rows) {
#pragma GCC unroll 8
            for (int l = 0; l < K; l++) {
                Vec v[T];
#pragma GCC unroll 8
                for (int t = 0; t < T; t++)
                    v[t] = Edge && (t == 0 || t >= T - 2) ? load_lanes(x + l + start(t), exist[l][t])
                                                          : load(x + l + start(t));
#pragma GCC unroll 8
                for (int k = 0; k < K; k++) {
                    const Vec tap = broadcast(taps[k * K + l]);
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) sum[k][t] += tap * v[t];
                }
            }
        }
        if (i >= begin + K - 1) {
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const Vec v = finish(sum[0][t], bias, p.relu);
                if (t < T - 1 || last_lanes == kLanes)
                    store(y + start(t), v);
                else
                    store_some(y + start(t), v, last_lanes);
            }
        }
#pragma GCC unroll 8
        for (int k = 0; k < K - 1; k++)
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) sum[k][t] = sum[k + 1][t];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[K - 1][t] = Vec{};
    }
}

typedef void (*StripKernel)(const Plane&, const float* taps, int col, int begin, int end);

template <int K, int T, bool Edge>
static constexpr StripKernel strip_kernel() {
    if constexpr (T <= strip_of(K))
        return convolve_strip<K, T, Edge>;
    else
        return nullptr;
}

template <int K>
static void convolve_plane(const Plane& p, int begin, int end) {
    static constexpr StripKernel inner[kMaxStrip] = {strip_kernel<K, 1, false>(), strip_kernel<K, 2, false>(),
                                                     strip_kernel<K, 3, false>(), strip_kernel<K, 4, false>()};
    static constexpr StripKernel edge[kMaxStrip] = {strip_kernel<K, 1, true>(), strip_kernel<K, 2, true>(),
                                                    strip_kernel<K, 3, true>(), strip_kernel<K, 4, true>()};
    float taps[K * K];  // of the sums of a strip
    for (int k = 0; k < K; k++)
        for (int l = 0; l < K; l++) taps[k * K + l] = p.w[(K - 1 - k) * p.w_pitch + l * p.w_step];
    const int vectors = int(divide_up(p.y_cols, kLanes));
    const Split strips(vectors, strip_of(K));
    for (int i = 0; i < strips.parts; i++) {
        const int col = strips.begin(i) * kLanes, width = strips.end(i) - strips.begin(i);
        const int first = col - p.pad_left;
        const bool inside = first >= 0 && first + width * kLanes + K - 1 <= p.x_cols;
        (inside ? inner : edge)[width - 1](p, taps, col, begin, end);
    }
}

// Whether a pass is for these kernels: columns adjacent on both sides.
static bool suits_rows(const rk_problem& p) {
    const int64_t cols = p.pass == RK_GRAD_INPUT ? p.in_w : p.out_w;
    const int64_t right = p.out_w + p.kernel_w - 1 - p.in_w - p.pad_left;  // padding, without stride and dilation
    return p.pass != RK_GRAD_WEIGHT && p.dtype == RK_F32 && p.kernel_h == p.kernel_w &&
           (p.kernel_w == 3 || p.kernel_w == 5 || p.kernel_w == 7) && p.stride_h == 1 && p.stride_w == 1 &&
           p.dilation_h == 1 && p.dilation_w == 1 && p.input_stride[3] == 1 && p.output_stride[3] == 1 &&
           p.pad_top < p.kernel_h && p.pad_left < p.kernel_w && right >= 0 && right < p.kernel_w &&
           cols >= fewest_columns(p.kernel_w, p.channels);
}

static Plane plane_of(const Call& call, int64_t n, int64_t channel) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int taps = p.kernel_w, corner = flipped ? taps * taps - 1 : 0, direction = flipped ? -1 : 1;
    const float* input = static_cast<const float*>(call.input) + n * p.input_stride[0] + channel * p.input_stride[1];
    const float* output = static_cast<const float*>(call.output) + n * p.output_stride[0] + channel * p.output_stride[1];
    Plane plane = {};
    plane.x = flipped ? output : input;
    plane.x_pitch = flipped ? p.output_stride[2] : p.input_stride[2];
    plane.x_rows = int(flipped ? p.out_h : p.in_h);
    plane.x_cols = int(flipped ? p.out_w : p.in_w);
    plane.w = call.weight + channel * taps * taps + corner;
    plane.w_pitch = direction * taps;
    plane.w_step = direction;
    plane.pad_top = flipped ? taps - 1 - p.pad_top : p.pad_top;
    plane.pad_left = flipped ? taps - 1 - p.pad_left : p.pad_left;
    plane.y = const_cast<float*>(flipped ? input : output);
    plane.y_pitch = flipped ? p.input_stride[2] : p.output_stride[2];
    plane.y_rows = int(flipped ? p.in_h : p.out_h);
    plane.y_cols = int(flipped ? p.in_w : p.out_w);
    plane.bias = call.bias ? call.bias[channel] : 0;
    plane.relu = p.relu;
    return plane;
}

static void run_rows(const Call& call) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int64_t planes = p.batch * p.channels, rows = flipped ? p.in_h : p.out_h, cols = flipped ? p.in_w : p.out_w;
    const int64_t plane_bytes = rows * cols * int64_t(sizeof(float));
    const int64_t for_threads = at_most(divide_up(kMinJobs, planes), rows / 8);
    const int64_t for_caches = at_most(divide_up(plane_bytes, kPieceBytes), rows / 32);  // rows are read again at borders
    const int64_t bands = at_least(1, at_least(for_threads, for_caches)), jobs = planes * bands;
    const bool fetches = planes * plane_bytes > kForeseenMaps ||
                         (outgrows_caches(p) && plane_bytes / bands > kForeseenBytes);
    const auto first_row = [&](int64_t job) { return rows * (job % bands) / bands; };
    const auto plane = [&](int64_t job) { return plane_of(call, job / bands / p.channels, job / bands % p.channels); };
    void (*const convolve)(const Plane&, int, int) =
        p.kernel_w == 3 ? convolve_plane<3> : p.kernel_w == 5 ? convolve_plane<5> : convolve_plane<7>;
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t i = jobs * thread / threads; i < jobs * (thread + 1) / threads; i++) {
            Plane now = plane(i);
            if (fetches && i + 1 < jobs) {
                const Plane next = plane(i + 1);
                now.next_x = next.x + first_row(i + 1) * next.x_pitch;
                now.next_y = next.y + first_row(i + 1) * next.y_pitch;
            }
            convolve(now, int(first_row(i)), int(rows * (i % bands + 1) / bands));
        }
    }
}

}  // namespace direct
}  // namespace RK_ISA

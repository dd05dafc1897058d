// Batch norm with the statistics of the batch, and the activation behind it, over rows of pixels: forward and backward.
//
// Each thread takes an equal share of the rows. Sums over rows run down strips of kChunk rows by a few vectors of
// channels: in registers, then, strip by strip, in a line of channels for each thread, then over the threads.
#pragma once

#include <omp.h>
#include <stdlib.h>

#include "activation.h"
#include "kernels.h"

namespace RK_ISA {
namespace norm {

constexpr int64_t kChunk = 16;
constexpr int kWide = 4;  // vectors of a strip

static RK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static RK_INLINE Vec square_root(Vec v) {
    for (int i = 0; i < kLanes; i++) v[i] = __builtin_sqrtf(v[i]);
    return v;
}

// Lines of channels, filled up to whole vectors.
static int64_t line_floats(const rk_norm& n) { return (n.channels + kLanes - 1) / kLanes * kLanes; }

template <bool Some>
static RK_INLINE Vec load_channels(const float* p, int count) {
    return Some ? load_some(p, count) : load(p);
}

template <bool Some>
static RK_INLINE void store_channels(float* p, Vec v, int count) {
    Some ? store_some(p, v, count) : store(p, v);
}

template <int V, bool Some>
struct Strip {
    static constexpr int vectors = V;
    static constexpr bool some = Some;
};

// Calls f(Strip, first channel, number of channels in the last vector) for all channels.
template <class F>
static RK_INLINE void each_strip(int64_t channels, F f) {
    int64_t c = 0;
    for (; c + kWide * kLanes <= channels; c += kWide * kLanes) f(Strip<kWide, false>{}, c, kLanes);
    for (; c + kLanes <= channels; c += kLanes) f(Strip<1, false>{}, c, kLanes);
    if (c < channels) f(Strip<1, true>{}, c, int(channels - c));
}

// What normalizes: (x - mean) * scale + bias. Lines of channels.
struct Affine {
    float *mean, *scale, *bias;
};

static void make_affine(const rk_norm& n, const float* mean, const float* variance, const Affine& affine) {
    for (int64_t c = 0; c < n.channels; c += kLanes) {
        const int count = int(smaller(kLanes, n.channels - c));
        const Vec weight = n.weight ? load_some(n.weight + c, count) : broadcast(1);
        store(affine.mean + c, load_some(mean + c, count));
        store(affine.scale + c, weight / square_root(load_some(variance + c, count) + n.eps));
        store(affine.bias + c, n.bias ? load_some(n.bias + c, count) : Vec{});
    }
}

// Two lines of sums for each thread.
struct Sums {
    float* first;
    int64_t line;

    float* of(int64_t thread, int which) const { return first + (2 * thread + which) * line; }
};

// ---------------------------------------------------------------- statistics

// Joins the mean and the squared deviations of `added` more rows with those of the rows so far (Chan, Golub, LeVeque).
static RK_INLINE void join(float rows, float added, Vec mean, Vec squares, float* all_mean, float* all_squares) {
    const Vec before = load(all_mean), delta = mean - before;
    store(all_mean, before + delta * (added / (rows + added)));
    store(all_squares, load(all_squares) + squares + delta * delta * (rows * added / (rows + added)));
}

static void share_statistics(const rk_norm& n, const float* x, int64_t begin, int64_t end, float* mean,
                             float* squares) {
    for (int64_t row = begin; row < end; row += kChunk) {
        const int64_t rows = smaller(kChunk, end - row);
        each_strip(n.channels, [&](auto strip, int64_t c, int count) __attribute__((always_inline)) {
            constexpr int V = decltype(strip)::vectors;
            constexpr bool some = decltype(strip)::some;
            const float* first = x + row * n.channels + c;
            Vec sum[V] = {}, square[V] = {};
            for (int64_t r = 0; r < rows; r++)
                for (int v = 0; v < V; v++) sum[v] += load_channels<some>(first + r * n.channels + v * kLanes, count);
            for (int v = 0; v < V; v++) sum[v] = sum[v] * (1.0f / float(rows));
            for (int64_t r = 0; r < rows; r++)
                for (int v = 0; v < V; v++) {
                    const Vec d = load_channels<some>(first + r * n.channels + v * kLanes, count) - sum[v];
                    square[v] += d * d;
                }
            for (int v = 0; v < V; v++)
                join(float(row - begin), float(rows), sum[v], square[v], mean + c + v * kLanes,
                     squares + c + v * kLanes);
        });
    }
}

// ---------------------------------------------------------------- activations

struct Identity {
    static constexpr bool kept = false;  // whether the gradient before the activation is worth keeping
    static RK_INLINE Vec value(Vec z) { return z; }
    static RK_INLINE Vec gradient(Vec, Vec g) { return g; }
};

struct Relu {
    static constexpr bool kept = false;
    static RK_INLINE Vec value(Vec z) { return max_with_zero(z); }
    static RK_INLINE Vec gradient(Vec z, Vec g) { return z <= Vec{} ? Vec{} : g; }
};

struct Gelu {
    static constexpr bool kept = true;
    static RK_INLINE Vec value(Vec z) { return gelu(z); }
    static RK_INLINE Vec gradient(Vec z, Vec g) { return g * gelu_slope(z); }
};

// ---------------------------------------------------------------- passes

template <class Activation>
static void share_output(const rk_norm& n, const float* x, const Affine& affine, int64_t begin, int64_t end, float* y) {
    for (int64_t row = begin; row < end; row++)
        each_strip(n.channels, [&](auto strip, int64_t c, int count) __attribute__((always_inline)) {
            constexpr bool some = decltype(strip)::some;
            for (int v = 0; v < decltype(strip)::vectors; v++) {
                const int64_t i = c + v * kLanes, at = row * n.channels + i;
                const Vec z = (load_channels<some>(x + at, count) - load(affine.mean + i)) * load(affine.scale + i) +
                              load(affine.bias + i);
                store_channels<some>(y + at, Activation::value(z), count);
            }
        });
}

// Sums of g and of g * (x - mean), g being the gradient before the activation; keeps g in grad_input.
template <class Activation>
static void share_sums(const rk_norm& n, const float* x, const float* grad, const Affine& affine, int64_t begin,
                       int64_t end, float* grad_input, float* sums, float* products) {
    for (int64_t row = begin; row < end; row += kChunk) {
        const int64_t last = smaller(row + kChunk, end);
        each_strip(n.channels, [&](auto strip, int64_t c, int count) __attribute__((always_inline)) {
            constexpr int V = decltype(strip)::vectors;
            constexpr bool some = decltype(strip)::some;
            Vec sum[V] = {}, product[V] = {};
            for (int64_t r = row; r < last; r++)
                for (int v = 0; v < V; v++) {
                    const int64_t i = c + v * kLanes, at = r * n.channels + i;
                    const Vec d = load_channels<some>(x + at, count) - load(affine.mean + i);
                    const Vec g = Activation::gradient(d * load(affine.scale + i) + load(affine.bias + i),
                                                       load_channels<some>(grad + at, count));
                    if (Activation::kept) store_channels<some>(grad_input + at, g, count);
                    sum[v] += g;
                    product[v] += g * d;
                }
            for (int v = 0; v < V; v++) {
                store(sums + c + v * kLanes, load(sums + c + v * kLanes) + sum[v]);
                store(products + c + v * kLanes, load(products + c + v * kLanes) + product[v]);
            }
        });
    }
}

// grad_input = scale * g + constant + slope * (x - mean)
template <class Activation>
static void share_gradient(const rk_norm& n, const float* x, const float* grad, const Affine& affine,
                           const float* constant, const float* slope, int64_t begin, int64_t end, float* grad_input) {
    for (int64_t row = begin; row < end; row++)
        each_strip(n.channels, [&](auto strip, int64_t c, int count) __attribute__((always_inline)) {
            constexpr bool some = decltype(strip)::some;
            for (int v = 0; v < decltype(strip)::vectors; v++) {
                const int64_t i = c + v * kLanes, at = row * n.channels + i;
                const Vec d = load_channels<some>(x + at, count) - load(affine.mean + i), scale = load(affine.scale + i);
                const Vec g = Activation::kept ? load_channels<some>(grad_input + at, count)
                                               : Activation::gradient(d * scale + load(affine.bias + i),
                                                                      load_channels<some>(grad + at, count));
                store_channels<some>(grad_input + at, scale * g + load(constant + i) + load(slope + i) * d, count);
            }
        });
}

struct Memory {
    float* data;
    Sums sums;
    Affine affine;
    float *constant, *slope;

    Memory(const rk_norm& n) {
        const int64_t line = line_floats(n), lines = 2 * n.threads + 5;
        data = static_cast<float*>(aligned_alloc(64, (lines * line * sizeof(float) + 63) / 64 * 64));
        if (!data) return;
        for (int64_t i = 0; i < lines * line; i++) data[i] = 0;
        float* rest = data + 2 * n.threads * line;
        sums = {data, line};
        affine = {rest, rest + line, rest + 2 * line};
        constant = rest + 3 * line;
        slope = rest + 4 * line;
    }
    ~Memory() { free(data); }
};

template <class Activation>
static int forward(const rk_norm& n, const float* x, float* mean, float* variance, float* y) {
    const Memory memory(n);
    if (!memory.data) return RK_OUT_OF_MEMORY;
#pragma omp parallel num_threads(n.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const auto begin = [&](int64_t t) { return n.rows * t / threads; };
        share_statistics(n, x, begin(thread), begin(thread + 1), memory.sums.of(thread, 0), memory.sums.of(thread, 1));
#pragma omp barrier
#pragma omp single
        {
            float *const all_mean = memory.sums.of(0, 0), *const all_squares = memory.sums.of(0, 1);
            for (int64_t t = 1; t < threads; t++)
                if (begin(t + 1) > begin(t))
                    for (int64_t c = 0; c < n.channels; c += kLanes)
                        join(float(begin(t)), float(begin(t + 1) - begin(t)), load(memory.sums.of(t, 0) + c),
                             load(memory.sums.of(t, 1) + c), all_mean + c, all_squares + c);
            for (int64_t c = 0; c < n.channels; c++) {
                mean[c] = all_mean[c];
                variance[c] = all_squares[c] / float(n.rows);
            }
            make_affine(n, mean, variance, memory.affine);
        }
        share_output<Activation>(n, x, memory.affine, begin(thread), begin(thread + 1), y);
    }
    return RK_OK;
}

template <class Activation>
static int backward(const rk_norm& n, const float* x, const float* mean, const float* variance, const float* grad,
                    float* grad_input, float* grad_weight, float* grad_bias) {
    const Memory memory(n);
    if (!memory.data) return RK_OUT_OF_MEMORY;
    make_affine(n, mean, variance, memory.affine);
#pragma omp parallel num_threads(n.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t begin = n.rows * thread / threads, end = n.rows * (thread + 1) / threads;
        share_sums<Activation>(n, x, grad, memory.affine, begin, end, grad_input, memory.sums.of(thread, 0),
                               memory.sums.of(thread, 1));
#pragma omp barrier
#pragma omp single
        for (int64_t c = 0; c < n.channels; c++) {
            float sum = 0, product = 0;
            for (int64_t t = 0; t < threads; t++) {
                sum += memory.sums.of(t, 0)[c];
                product += memory.sums.of(t, 1)[c];
            }
            const float precision = 1 / (variance[c] + n.eps);
            grad_bias[c] = sum;
            grad_weight[c] = product * __builtin_sqrtf(precision);
            memory.constant[c] = -memory.affine.scale[c] * sum / float(n.rows);
            memory.slope[c] = -memory.affine.scale[c] * precision * product / float(n.rows);
        }
        share_gradient<Activation>(n, x, grad, memory.affine, memory.constant, memory.slope, begin, end, grad_input);
    }
    return RK_OK;
}

static int forward_any(const rk_norm* n, const float* x, float* mean, float* variance, float* y) {
    if (n->activation == RK_GELU) return forward<Gelu>(*n, x, mean, variance, y);
    if (n->activation == RK_RELU) return forward<Relu>(*n, x, mean, variance, y);
    return forward<Identity>(*n, x, mean, variance, y);
}

static int backward_any(const rk_norm* n, const float* x, const float* mean, const float* variance, const float* grad,
                        float* grad_input, float* grad_weight, float* grad_bias) {
    if (n->activation == RK_GELU)
        return backward<Gelu>(*n, x, mean, variance, grad, grad_input, grad_weight, grad_bias);
    if (n->activation == RK_RELU)
        return backward<Relu>(*n, x, mean, variance, grad, grad_input, grad_weight, grad_bias);
    return backward<Identity>(*n, x, mean, variance, grad, grad_input, grad_weight, grad_bias);
}

}  // namespace norm
}  // namespace RK_ISA

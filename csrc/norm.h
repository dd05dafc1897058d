// Batch norm with the statistics of the batch, of one input or of two whose results are added up, and the activation behind it,
// over rows of pixels: forward and backward.
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
static int64_t line_floats(const Norms& n) { return (n.channels + kLanes - 1) / kLanes * kLanes; }

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

    RK_INLINE Vec deviation(int64_t channel, Vec x) const { return x - load(mean + channel); }
    RK_INLINE Vec normalized(int64_t channel, Vec deviation) const {
        return deviation * load(scale + channel) + load(bias + channel);
    }
};

static void make_affine(const rk_norm& norm, int64_t channels, const Affine& affine) {
    for (int64_t c = 0; c < channels; c += kLanes) {
        const int count = int(smaller(kLanes, channels - c));
        const Vec weight = norm.weight ? load_some(norm.weight + c, count) : broadcast(1);
        store(affine.mean + c, load_some(norm.mean + c, count));
        store(affine.scale + c, weight / square_root(load_some(norm.variance + c, count) + norm.eps));
        store(affine.bias + c, norm.bias ? load_some(norm.bias + c, count) : Vec{});
    }
}

// What a call computes with, lines of channels: for each thread two lines of sums for each input, and for each input what
// normalizes it and what its gradient is made of, slope * (x - mean) + constant beside the scaled gradient of the output.
template <int Inputs>
struct Memory {
    float* data;
    int64_t line;
    Affine affine[Inputs];
    float *constant[Inputs], *slope[Inputs];

    explicit Memory(const Norms& n) : line(line_floats(n)) {
        const int64_t sums = 2 * Inputs * n.threads, lines = sums + 5 * Inputs;
        data = static_cast<float*>(aligned_alloc(64, (lines * line * sizeof(float) + 63) / 64 * 64));
        if (!data) return;
        for (int64_t i = 0; i < lines * line; i++) data[i] = 0;
        for (int i = 0; i < Inputs; i++) {
            float* const own = data + (sums + 5 * i) * line;
            affine[i] = {own, own + line, own + 2 * line};
            constant[i] = own + 3 * line;
            slope[i] = own + 4 * line;
        }
    }
    ~Memory() { free(data); }
    float* sums(int64_t thread, int which) const { return data + (2 * Inputs * thread + which) * line; }
};

// ---------------------------------------------------------------- statistics

// Joins the mean and the squared deviations of `added` more rows with those of the rows so far (Chan, Golub, LeVeque).
static RK_INLINE void join(float rows, float added, Vec mean, Vec squares, float* all_mean, float* all_squares) {
    const Vec before = load(all_mean), delta = mean - before;
    store(all_mean, before + delta * (added / (rows + added)));
    store(all_squares, load(all_squares) + squares + delta * delta * (rows * added / (rows + added)));
}

static void share_statistics(const Norms& n, const float* x, int64_t begin, int64_t end, float* mean,
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

// Moves running statistics towards those of the batch.
static void record(const rk_norm& norm, int64_t rows, int64_t channels) {
    if (norm.batches) ++*norm.batches;
    if (!norm.running_mean) return;
    const float unbiased = float(rows) / float(rows > 1 ? rows - 1 : 1);
    for (int64_t c = 0; c < channels; c++) {
        norm.running_mean[c] += norm.momentum * (norm.mean[c] - norm.running_mean[c]);
        norm.running_variance[c] += norm.momentum * (norm.variance[c] * unbiased - norm.running_variance[c]);
    }
}

template <class Activation, int Inputs>
static void share_output(const Norms& n, const Residual& after, const Memory<Inputs>& memory, int64_t begin, int64_t end,
                         float* y) {
    for (int64_t row = begin; row < end; row++) {
        const float scale = after.scale(row);
        each_strip(n.channels, [&](auto strip, int64_t first, int count) __attribute__((always_inline)) {
            constexpr bool some = decltype(strip)::some;
            for (int v = 0; v < decltype(strip)::vectors; v++) {
                const int64_t c = first + v * kLanes, at = row * n.channels + c;
                Vec z = {};
                for (int i = 0; i < Inputs; i++) {
                    const Affine& affine = memory.affine[i];
                    z += affine.normalized(c, affine.deviation(c, load_channels<some>(n.input[i] + at, count)));
                }
                z = Activation::value(z) * scale;
                if (after.residual) z += load_channels<some>(after.residual + at, count);
                store_channels<some>(y + at, z, count);
            }
        });
    }
}

// Sums of g and, for each input, of g * (x - mean), g being the gradient before the activation; keeps g in grad_input.
template <class Activation, int Inputs>
static void share_sums(const Norms& n, const Residual& after, const Memory<Inputs>& memory, int64_t begin, int64_t end,
                       const float* grad, float* grad_input, int64_t thread) {
    for (int64_t row = begin; row < end; row += kChunk) {
        const int64_t last = smaller(row + kChunk, end);
        float scale[kChunk];
        for (int64_t r = row; r < last; r++) scale[r - row] = after.scale(r);
        each_strip(n.channels, [&](auto strip, int64_t first, int count) __attribute__((always_inline)) {
            constexpr int V = decltype(strip)::vectors;
            constexpr bool some = decltype(strip)::some;
            Vec sum[V] = {}, product[Inputs][V] = {};
            for (int64_t r = row; r < last; r++)
                for (int v = 0; v < V; v++) {
                    const int64_t c = first + v * kLanes, at = r * n.channels + c;
                    Vec d[Inputs], z = {};
                    for (int i = 0; i < Inputs; i++) {
                        d[i] = memory.affine[i].deviation(c, load_channels<some>(n.input[i] + at, count));
                        z += memory.affine[i].normalized(c, d[i]);
                    }
                    const Vec g = Activation::gradient(z, load_channels<some>(grad + at, count) * scale[r - row]);
                    if (Activation::kept) store_channels<some>(grad_input + at, g, count);
                    sum[v] += g;
                    for (int i = 0; i < Inputs; i++) product[i][v] += g * d[i];
                }
            const auto add = [&](float* line, const Vec* added) {
                for (int v = 0; v < V; v++) {
                    float* const to = line + first + v * kLanes;
                    store(to, load(to) + added[v]);
                }
            };
            add(memory.sums(thread, 0), sum);
            for (int i = 0; i < Inputs; i++) add(memory.sums(thread, 1 + i), product[i]);
        });
    }
}

// grad_input = scale * g + constant + slope * (x - mean), and what is added
template <class Activation, int Inputs>
static void share_gradient(const Norms& n, const Residual& after, const Memory<Inputs>& memory, int64_t begin, int64_t end,
                           const float* grad, float* const* grad_input) {
    for (int64_t row = begin; row < end; row++) {
        const float scale = after.scale(row);
        each_strip(n.channels, [&](auto strip, int64_t first, int count) __attribute__((always_inline)) {
            constexpr bool some = decltype(strip)::some;
            for (int v = 0; v < decltype(strip)::vectors; v++) {
                const int64_t c = first + v * kLanes, at = row * n.channels + c;
                Vec d[Inputs], z = {};
                for (int i = 0; i < Inputs; i++) {
                    d[i] = memory.affine[i].deviation(c, load_channels<some>(n.input[i] + at, count));
                    z += memory.affine[i].normalized(c, d[i]);
                }
                const Vec g = Activation::kept ? load_channels<some>(grad_input[0] + at, count)
                                               : Activation::gradient(z, load_channels<some>(grad + at, count) * scale);
                for (int i = 0; i < Inputs; i++) {
                    Vec to = load(memory.affine[i].scale + c) * g + load(memory.constant[i] + c) +
                             load(memory.slope[i] + c) * d[i];
                    if (after.residual) to += load_channels<some>(after.residual + at, count);
                    store_channels<some>(grad_input[i] + at, to, count);
                }
            }
        });
    }
}

template <class Activation, int Inputs>
static int forward(const Norms& n, const Residual& after, float* output) {
    const Memory<Inputs> memory(n);
    if (!memory.data) return RK_OUT_OF_MEMORY;
#pragma omp parallel num_threads(n.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const auto begin = [&](int64_t t) { return n.rows * t / threads; };
        for (int i = 0; i < Inputs; i++)
            share_statistics(n, n.input[i], begin(thread), begin(thread + 1), memory.sums(thread, 2 * i),
                             memory.sums(thread, 2 * i + 1));
#pragma omp barrier
#pragma omp single
        for (int i = 0; i < Inputs; i++) {
            float *const mean = memory.sums(0, 2 * i), *const squares = memory.sums(0, 2 * i + 1);
            for (int64_t t = 1; t < threads; t++)
                if (begin(t + 1) > begin(t))
                    for (int64_t c = 0; c < n.channels; c += kLanes)
                        join(float(begin(t)), float(begin(t + 1) - begin(t)), load(memory.sums(t, 2 * i) + c),
                             load(memory.sums(t, 2 * i + 1) + c), mean + c, squares + c);
            for (int64_t c = 0; c < n.channels; c++) {
                n.norm[i].mean[c] = mean[c];
                n.norm[i].variance[c] = squares[c] / float(n.rows);
            }
            make_affine(n.norm[i], n.channels, memory.affine[i]);
            record(n.norm[i], n.rows, n.channels);
        }
        share_output<Activation>(n, after, memory, begin(thread), begin(thread + 1), output);
    }
    return RK_OK;
}

template <class Activation, int Inputs>
static int backward(const Norms& n, const Residual& after, const float* grad_output, float* const* grad_input) {
    const Memory<Inputs> memory(n);
    if (!memory.data) return RK_OUT_OF_MEMORY;
    for (int i = 0; i < Inputs; i++) make_affine(n.norm[i], n.channels, memory.affine[i]);
#pragma omp parallel num_threads(n.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t begin = n.rows * thread / threads, end = n.rows * (thread + 1) / threads;
        share_sums<Activation>(n, after, memory, begin, end, grad_output, grad_input[0], thread);
#pragma omp barrier
#pragma omp single
        for (int i = 0; i < Inputs; i++)
            for (int64_t c = 0; c < n.channels; c++) {
                const rk_norm& norm = n.norm[i];
                float sum = 0, product = 0;
                for (int64_t t = 0; t < threads; t++) {
                    sum += memory.sums(t, 0)[c];
                    product += memory.sums(t, 1 + i)[c];
                }
                const float precision = 1 / (norm.variance[c] + norm.eps), scale = memory.affine[i].scale[c];
                norm.grad_bias[c] = sum;
                norm.grad_weight[c] = product * __builtin_sqrtf(precision);
                memory.constant[i][c] = -scale * sum / float(n.rows);
                memory.slope[i][c] = -scale * precision * product / float(n.rows);
            }
        share_gradient<Activation>(n, after, memory, begin, end, grad_output, grad_input);
    }
    return RK_OK;
}

template <int Inputs>
static int forward_of(const Norms& n, const Residual& after, float* output) {
    if (n.activation == RK_GELU) return forward<Gelu, Inputs>(n, after, output);
    if (n.activation == RK_RELU) return forward<Relu, Inputs>(n, after, output);
    return forward<Identity, Inputs>(n, after, output);
}

template <int Inputs>
static int backward_of(const Norms& n, const Residual& after, const float* grad_output, float* const* grad_input) {
    if (n.activation == RK_GELU) return backward<Gelu, Inputs>(n, after, grad_output, grad_input);
    if (n.activation == RK_RELU) return backward<Relu, Inputs>(n, after, grad_output, grad_input);
    return backward<Identity, Inputs>(n, after, grad_output, grad_input);
}

static int forward_any(const Norms& n, const Residual& after, float* output) {
    return n.count == 2 ? forward_of<2>(n, after, output) : forward_of<1>(n, after, output);
}

static int backward_any(const Norms& n, const Residual& after, const float* grad_output, float* const* grad_input) {
    return n.count == 2 ? backward_of<2>(n, after, grad_output, grad_input) : backward_of<1>(n, after, grad_output, grad_input);
}

}  // namespace norm
}  // namespace RK_ISA

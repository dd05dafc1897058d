// Checks the native core against sums in double: random problems, every pass, layout, dtype and instruction set.
//
// Tensors are allocated to the byte and off alignment, so that a build with AddressSanitizer sees every stray access.
// Usage: check_core [problems] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "replknet_core.h"

namespace {

std::mt19937 rng;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
template <class T>
T pick(std::initializer_list<T> values) {
    return values.begin()[pick(0, int(values.size()) - 1)];
}

uint16_t to_bf16(double value) {
    const float f = float(value);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double from_bf16(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

double from_f16(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return half & 0x8000 ? -magnitude : magnitude;
}

uint16_t to_f16(double value) {
    int exponent;
    std::frexp(value, &exponent);
    const double unit = std::ldexp(1, std::max(exponent, -13) - 11);
    const double rounded = std::abs(std::nearbyint(value / unit) * unit);
    const uint16_t sign = value < 0 ? 0x8000 : 0;
    if (rounded < std::ldexp(1, -14)) return uint16_t(sign | int(rounded * 16777216));
    std::frexp(rounded, &exponent);
    return uint16_t(sign | (exponent + 14) << 10 | (int(std::ldexp(rounded, 11 - exponent)) & 1023));
}

// An (n, c, h, w) tensor of one of the dtypes, in a buffer of exactly its size, one element off alignment.
struct Tensor {
    int64_t n, c, h, w, stride[4];
    int dtype;
    std::vector<double> values;  // n, c, h, w contiguous
    char* memory;
    size_t bytes;

    Tensor(int64_t n, int64_t c, int64_t h, int64_t w, int dtype, int layout) : n(n), c(c), h(h), w(w), dtype(dtype) {
        const int64_t nchw[4] = {c * h * w, h * w, w, 1}, nhwc[4] = {h * w * c, 1, w * c, c};
        const int64_t spread[4] = {c * h * w * 2, h * w * 2, w * 2, 2};
        const int64_t* chosen = layout == 0 ? nchw : layout == 1 ? nhwc : spread;
        std::copy(chosen, chosen + 4, stride);
        values.resize(size_t(n * c * h * w));
        bytes = values.empty() ? 0 : size_t(offset(n - 1, c - 1, h - 1, w - 1) + 1) * size();
        memory = static_cast<char*>(std::malloc(bytes + size()));
        std::memset(memory, 0xff, bytes + size());  // NaN
    }
    Tensor(const Tensor&) = delete;
    ~Tensor() { std::free(memory); }

    size_t size() const { return dtype == RK_F32 ? 4 : 2; }
    void* data() const { return memory + size(); }
    int64_t offset(int64_t i, int64_t j, int64_t k, int64_t l) const {
        return i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
    }
    double& at(int64_t i, int64_t j, int64_t k, int64_t l) { return values[size_t(((i * c + j) * h + k) * w + l)]; }

    template <class F>
    void each(F f) {
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < c; j++)
                for (int64_t k = 0; k < h; k++)
                    for (int64_t l = 0; l < w; l++)
                        f(at(i, j, k, l), static_cast<char*>(data()) + size_t(offset(i, j, k, l)) * size());
    }

    void randomize() {
        std::uniform_real_distribution<double> uniform(-1, 1);
        each([&](double& value, char* p) {
            value = uniform(rng);
            if (dtype == RK_F32) {
                const float f = float(value);
                std::memcpy(p, &f, 4);
            } else {
                const uint16_t half = dtype == RK_BF16 ? to_bf16(value) : to_f16(value);
                std::memcpy(p, &half, 2);
            }
            value = stored(p);
        });
    }

    double stored(const char* p) const {
        if (dtype == RK_F32) {
            float f;
            std::memcpy(&f, p, 4);
            return f;
        }
        uint16_t half;
        std::memcpy(&half, p, 2);
        return dtype == RK_BF16 ? from_bf16(half) : from_f16(half);
    }

    // Largest difference between memory and values, over the largest value.
    double error() {
        double largest = 0, worst = 0;
        each([&](double& value, char* p) {
            const double difference = std::abs(stored(p) - value);
            largest = std::max(largest, std::abs(value));
            worst = difference <= worst ? worst : difference;  // takes NaN
            if (std::isnan(difference)) worst = 1e30;
        });
        return largest > 0 ? worst / largest : worst;
    }
};

// Random floats in a buffer that ends with them, one float off alignment.
struct Floats {
    std::vector<char> bytes;

    explicit Floats(int64_t count) : bytes(4 * count + 4) {
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < count; i++) set(i, normal(rng));
    }
    float* data() { return reinterpret_cast<float*>(bytes.data() + 4); }
    void set(int64_t i, float value) { data()[i] = value; }
    double at(int64_t i) { return data()[i]; }
};

// Filters (channels, taps) packed, the last ones filled up with zeros.
Floats packed(const float* weights, int64_t channels, int64_t taps) {
    const int64_t lanes = RK_FILTER_LANES, groups = (channels + lanes - 1) / lanes;
    Floats result(groups * taps * lanes);
    for (int64_t c = 0; c < groups * lanes; c++)
        for (int64_t tap = 0; tap < taps; tap++)
            result.set((c / lanes * taps + tap) * lanes + c % lanes, c < channels ? weights[c * taps + tap] : 0);
    return result;
}

struct Axis {
    int64_t in, out, kernel, stride, dilation, pad;
};

Axis random_axis() {
    Axis a;
    do {
        a.in = pick({pick(1, 9), pick(1, 40)});
        a.kernel = pick({1, 2, 3, 4, 5, 7, 8, 9, 13, 31});
        a.stride = pick({1, 1, 1, 2, 3});
        a.dilation = a.stride > 1 ? 1 : pick({1, 1, 1, 2, 3});
        a.pad = pick({a.kernel / 2, a.kernel / 2, int64_t(0), a.kernel - 1, a.kernel + 1});
        const int64_t after = pick({a.pad, a.pad, int64_t(0), a.kernel / 2});
        a.out = a.in + a.pad + after - a.dilation * (a.kernel - 1) - 1;
        a.out = a.out < 0 ? 0 : a.out / a.stride + 1;
    } while (a.out < 1);
    return a;
}

// A kernel that reaches from every input to every output.
Axis whole_axis() {
    const int64_t size = pick(1, 16);
    return {size, size, 2 * size - 1, 1, 1, size - 1};
}

// A small kernel, as those that read their map where it lies.
Axis small_axis(int64_t kernel, int64_t stride, int64_t most) {
    const int64_t in = pick(kernel, most), pad = pick(int64_t(0), kernel);
    return {in, (in + 2 * pad - kernel) / stride + 1, kernel, stride, 1, pad};
}

template <class F>
void each_tap(const Axis& a, int64_t out, F f) {
    for (int64_t tap = 0; tap < a.kernel; tap++) {
        const int64_t in = out * a.stride + tap * a.dilation - a.pad;
        if (in >= 0 && in < a.in) f(tap, in);
    }
}

// f(n, c, input row, input column, output row, output column, tap row, tap column) for every product.
template <class F>
void each_product(const Axis& h, const Axis& w, int64_t n, int64_t c, F f) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < c; j++)
            for (int64_t row = 0; row < h.out; row++)
                for (int64_t col = 0; col < w.out; col++)
                    each_tap(h, row, [&](int64_t tap_row, int64_t in_row) {
                        each_tap(w, col, [&](int64_t tap_col, int64_t in_col) {
                            f(i, j, in_row, in_col, row, col, tap_row, tap_col);
                        });
                    });
}

struct Check {
    const char* isa;
    int failures = 0, runs[2] = {};
    double worst[3] = {};

    // In place: a small filter on tensors that are read where they lie, for which there are kernels of their own.
    void problem(int algorithm, bool in_place = false) {
        const int kind = in_place ? 1 : pick(0, 7), kernel = pick({3, 5, 7, 11}), stride = pick(1, 2);
        const int64_t most = pick(0, 7) ? 40 : 150;  // the larger may outgrow the caches
        const auto axis = [&] {
            return kind == 0 ? whole_axis() : kind == 1 ? small_axis(kernel, stride, most) : random_axis();
        };
        const Axis h = axis(), w = axis();
        const int64_t n = pick(1, 3), c = in_place ? pick(1, 40) : pick({pick(1, 8), pick(1, 40)});
        const int dtype = in_place ? RK_F32 : pick({RK_F32, RK_F32, RK_BF16, RK_F16});
        const int layout = in_place ? 1 : pick(0, 2), threads = pick(1, 3);
        Tensor input(n, c, h.in, w.in, dtype, layout), output(n, c, h.out, w.out, dtype, layout);
        Tensor weight(1, c, h.kernel, w.kernel, RK_F32, 0), bias(1, c, 1, 1, RK_F32, 0);
        rk_problem p = {n, c, h.in, w.in, h.out, w.out, {}, {}, int(h.kernel), int(w.kernel), int(h.stride),
                        int(w.stride), int(h.dilation), int(w.dilation), int(h.pad), int(w.pad), pick(0, 2), algorithm,
                        dtype, 0, 0, threads};
        std::copy(input.stride, input.stride + 4, p.input_stride);
        std::copy(output.stride, output.stride + 4, p.output_stride);
        p.relu = p.pass == RK_FORWARD && pick(0, 1);
        const bool with_bias = p.pass == RK_FORWARD && pick(0, 1);
        if (rk_supports(&p)) return;
        runs[algorithm]++;
        std::vector<char> spectrum;
        Tensor* result;
        int status = RK_OK;
        float* weights = static_cast<float*>(weight.data());
        if (p.pass == RK_FORWARD) {
            result = &output;
            input.randomize();
            weight.randomize();
            bias.randomize();
            each_product(h, w, n, c, [&](int64_t i, int64_t j, int64_t y, int64_t x, int64_t row, int64_t col, int64_t k,
                                         int64_t l) { output.at(i, j, row, col) += input.at(i, j, y, x) * weight.at(0, j, k, l); });
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < c; j++)
                    for (int64_t k = 0; k < h.out * w.out; k++) {
                        double& value = output.at(i, j, k / w.out, k % w.out);
                        value += with_bias ? bias.at(0, j, 0, 0) : 0;
                        if (p.relu) value = std::max(value, 0.0);
                    }
            Floats filters = packed(weights, c, h.kernel * w.kernel);
            p.packed_weight = pick(0, 1);
            if (p.packed_weight) weights = filters.data();
            const size_t bytes = rk_spectrum_bytes(&p);
            void* prepared = bytes && pick(0, 1) ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
            if (prepared) status = rk_prepare(&p, weights, prepared);
            if (!status)
                status = rk_run(&p, input.data(), weights, prepared,
                                with_bias ? static_cast<float*>(bias.data()) : nullptr, output.data());
            std::free(prepared);
        } else if (p.pass == RK_GRAD_INPUT) {
            result = &input;
            output.randomize();
            weight.randomize();
            each_product(h, w, n, c, [&](int64_t i, int64_t j, int64_t y, int64_t x, int64_t row, int64_t col, int64_t k,
                                         int64_t l) { input.at(i, j, y, x) += output.at(i, j, row, col) * weight.at(0, j, k, l); });
            status = rk_run(&p, input.data(), weights, nullptr, nullptr, output.data());
        } else {
            result = &weight;
            input.randomize();
            output.randomize();
            each_product(h, w, n, c, [&](int64_t i, int64_t j, int64_t y, int64_t x, int64_t row, int64_t col, int64_t k,
                                         int64_t l) { weight.at(0, j, k, l) += input.at(i, j, y, x) * output.at(i, j, row, col); });
            status = rk_run(&p, input.data(), weights, nullptr, nullptr, output.data());
        }
        const double rounding = result->dtype == RK_F32 ? 0 : result->dtype == RK_BF16 ? 0x1p-8 : 0x1p-11;
        const double error = result->error(), bound = rounding + 2e-6;
        if (!rounding) worst[p.pass] = std::max(worst[p.pass], error);
        if (status || !(error <= bound)) {
            failures++;
            std::printf("%s algorithm %d pass %d: status %d, error %g > %g; n %d c %d in %dx%d kernel %dx%d stride %dx%d "
                        "dilation %dx%d pad %d %d out %dx%d dtype %d layout %d threads %d\n",
                        isa, algorithm, p.pass, status, error, bound, int(n), int(c), int(h.in), int(w.in), p.kernel_h,
                        p.kernel_w, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w, p.pad_top, p.pad_left,
                        int(h.out), int(w.out), dtype, layout, threads);
        }
    }
};

// Worst error of a batch norm, and of a gradient that is known without its formula: that of the bias.
double norm_error() {
    const int64_t rows = pick(2, 70), channels = pick(1, 70);
    Floats x(rows * channels), y(rows * channels), grad(rows * channels), grad_input(rows * channels);
    Floats weight(channels), bias(channels), mean(channels), variance(channels), grad_weight(channels),
        grad_bias(channels);
    Floats running_mean(channels), running_variance(channels);
    const float moved_mean = float(running_mean.at(0)), moved_variance = float(running_variance.at(0));
    const bool affine = pick(0, 1), moves = pick(0, 1);
    const int activation = pick({RK_IDENTITY, RK_RELU, RK_GELU}), threads = pick(1, 3);
    int64_t batches = 4;
    const rk_norm n = {affine ? weight.data() : nullptr,
                       affine ? bias.data() : nullptr,
                       mean.data(),
                       variance.data(),
                       moves ? running_mean.data() : nullptr,
                       moves ? running_variance.data() : nullptr,
                       moves ? &batches : nullptr,
                       grad_weight.data(),
                       grad_bias.data(),
                       1e-5f,
                       0.25f};
    if (rk_norm_forward(&n, rows, channels, activation, x.data(), y.data(), threads) ||
        rk_norm_backward(&n, rows, channels, activation, x.data(), grad.data(), grad_input.data(), threads) ||
        batches != (moves ? 5 : 4))
        return INFINITY;
    double worst = 0;
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0, squares = 0, sum_grad = 0;
        for (int64_t r = 0; r < rows; r++) sum += x.at(r * channels + c) / rows;
        for (int64_t r = 0; r < rows; r++) squares += std::pow(x.at(r * channels + c) - sum, 2) / rows;
        if (moves && !c) {
            const double unbiased = squares * rows / (rows - 1);
            worst = std::max({worst, std::abs(running_mean.at(0) - (0.75 * moved_mean + 0.25 * sum)),
                              std::abs(running_variance.at(0) - (0.75 * moved_variance + 0.25 * unbiased))});
        }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t i = r * channels + c;
            const double scale = (affine ? weight.at(c) : 1) / std::sqrt(squares + n.eps);
            const double z = (x.at(i) - sum) * scale + (affine ? bias.at(c) : 0), phi = std::erfc(-z / std::sqrt(2)) / 2;
            const bool gelu = activation == RK_GELU, relu = activation == RK_RELU;
            worst = std::max(worst, std::abs(y.at(i) - (gelu ? z * phi : relu ? std::max(z, 0.0) : z)));
            if (relu && std::abs(z) < 1e-5) return worst;  // either slope is right
            const double slope = gelu ? phi + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI) : relu ? z > 0 : 1;
            sum_grad += grad.at(i) * slope;
        }
        worst = std::max(worst, std::abs(grad_bias.at(c) - sum_grad) / rows);
    }
    return worst;
}

// act(x @ weight + bias): a pointwise layer with a packed weight, which may have been divided by the sizes of channels, and
// what it computes.
struct Layer {
    int64_t inputs, outputs, columns = (outputs + RK_COLUMNS - 1) / RK_COLUMNS * RK_COLUMNS;
    int activation;
    Floats weight, bias, input_sizes, output_sizes;
    bool divided = pick(0, 1);
    std::unique_ptr<Floats> pair_sums;

    Layer(int64_t inputs, int64_t outputs, int activation)
        : inputs(inputs), outputs(outputs), activation(activation), weight(columns * inputs),
          bias(columns), input_sizes(inputs), output_sizes(columns) {
        for (int64_t i = 0; i < inputs; i++) input_sizes.set(i, std::ldexp(1.0f, pick(-2, 2)));
        for (int64_t o = 0; o < columns; o++) output_sizes.set(o, std::ldexp(1.0f, pick(-2, 2)));
    }
    rk_layer native() {
        rk_layer layer = {weight.data(), bias.data(), inputs, outputs, activation, nullptr, nullptr, nullptr};
        if (!divided) return layer;
        layer.input_sizes = input_sizes.data(), layer.output_sizes = output_sizes.data();
        if (const size_t bytes = rk_pair_sum_bytes(&layer)) {
            pair_sums = std::make_unique<Floats>(bytes / sizeof(float));
            rk_sum_pairs(&layer, pair_sums->data());
            layer.pair_sums = pair_sums->data();
        }
        return layer;
    }
    double size(int64_t i, int64_t o) { return divided ? input_sizes.at(i) * output_sizes.at(o) : 1; }
    std::vector<double> operator()(const std::vector<double>& x) {
        std::vector<double> y;
        for (size_t row = 0; row < x.size() / inputs; row++)
            for (int64_t o = 0; o < outputs; o++) {
                double z = bias.at(o);
                for (int64_t i = 0; i < inputs; i++)
                    z += x[row * inputs + i] * size(i, o) *
                         weight.at((o / RK_PANEL * inputs + i) * RK_PANEL + o % RK_PANEL);
                const bool gelu = activation == RK_GELU, relu = activation == RK_RELU;
                y.push_back(gelu ? z * std::erfc(-z / std::sqrt(2)) / 2 : relu ? std::max(z, 0.0) : z);
            }
        return y;
    }
};

// Worst error, relative to the largest output, of one pointwise layer or of a pair; one in twenty so large that Strassen's
// method, pairs or AMX compute it.
double pointwise_error() {
    const bool large = pick(0, 19) == 0, is_pair = pick(0, 1), with_residual = pick(0, 1);
    const int64_t images = pick(1, 3), threads = pick(1, 3);
    const int64_t inputs = large ? pick({512, 544, 1120}) : pick({pick(1, 70), pick(250, 600), 1024});
    const int64_t hidden = is_pair ? large ? pick({576, 601}) : pick(1, 300) : inputs;
    const int64_t outputs = large ? pick({512, 640, 77}) : pick(1, 70);
    const int64_t rows = images * (large ? pick({2 * pick(48, 70), pick(33, 800)}) : pick(1, inputs > 70 ? 7 : 70));
    const int activation = pick({RK_IDENTITY, RK_RELU, RK_GELU});
    Layer first(inputs, is_pair ? hidden : outputs, activation), second(hidden, outputs, RK_IDENTITY);
    Floats x(rows * inputs), residual(rows * outputs), y(rows * outputs);
    std::vector<double> expected(rows * inputs);
    for (int64_t i = 0; i < rows * inputs; i++) expected[i] = x.at(i);
    expected = first(expected);
    if (is_pair) expected = second(expected);
    const rk_layer one = first.native(), two = second.native();
    const float* added = with_residual ? residual.data() : nullptr;
    const int status = is_pair ? rk_pointwise_pair(&one, &two, images, rows / images, x.data(), added, y.data(), threads)
                               : rk_pointwise(&one, images, rows / images, x.data(), added, y.data(), threads);
    if (status) return INFINITY;
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < rows * outputs; i++) {
        const double value = expected[i] + (with_residual ? residual.at(i) : 0);
        worst = std::max(worst, std::abs(y.at(i) - value));
        largest = std::max(largest, std::abs(value));
    }
    return largest ? worst / largest : worst;
}

// How far a block with a large kernel and one without are from what their layers compute one by one: not at all.
double blocks_error() {
    const int64_t images = pick(1, 3), side = pick(1, 9), channels = pick(1, 40), size = images * side * side * channels;
    const int threads = pick(1, 3), kernel = 2 * pick(0, 6) + 1;
    Layer pw1(channels, channels, RK_RELU), pw2(channels, channels, RK_IDENTITY);
    Layer up(channels, pick(1, 80), RK_GELU), down(up.outputs, channels, RK_IDENTITY);
    Floats filters(channels * kernel * kernel), bias(channels), x(size), y(size), a(size), b(size), expected(size);
    rk_problem p = {};
    p.batch = images, p.channels = channels, p.in_h = p.in_w = p.out_h = p.out_w = side;
    const int64_t stride[4] = {side * side * channels, 1, side * channels, channels};
    std::copy(stride, stride + 4, p.input_stride), std::copy(stride, stride + 4, p.output_stride);
    p.kernel_h = p.kernel_w = kernel, p.pad_top = p.pad_left = kernel / 2;
    p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = p.relu = 1, p.threads = threads;
    const rk_layer first = pw1.native(), second = pw2.native(), third = up.native(), fourth = down.native();
    const rk_block blocks[2] = {{first, second, &p, filters.data(), nullptr, bias.data()},
                                {third, fourth, nullptr, nullptr, nullptr, nullptr}};
    const int64_t pixels = side * side;
    if (rk_blocks(blocks, 2, images, pixels, x.data(), y.data(), threads, nullptr) ||
        rk_pointwise(&first, images, pixels, x.data(), nullptr, a.data(), threads) ||
        rk_run(&p, a.data(), filters.data(), nullptr, bias.data(), b.data()) ||
        rk_pointwise(&second, images, pixels, b.data(), x.data(), expected.data(), threads) ||
        rk_pointwise_pair(&third, &fourth, images, pixels, expected.data(), expected.data(), expected.data(), threads))
        return INFINITY;
    double worst = 0;
    for (int64_t i = 0; i < size; i++) worst = std::max(worst, std::abs(double(y.at(i)) - expected.at(i)));
    return worst;
}

// Worst error, relative to the largest element, of a product of matrices.
double matmul_error() {
    const int64_t rows = pick(1, 80), columns = pick(1, 80), depth = pick({pick(1, 80), pick(500, 1100)});
    const bool left_transposed = pick(0, 1), right_transposed = pick(0, 1);
    Floats left(rows * depth), right(depth * columns), product(rows * columns);
    const rk_matrix a = {left.data(), left_transposed ? rows : depth, left_transposed};
    const rk_matrix b = {right.data(), right_transposed ? depth : columns, right_transposed};
    if (rk_matmul(&a, &b, rows, columns, depth, product.data(), pick(1, 3))) return INFINITY;
    double worst = 0, largest = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            double sum = 0;
            for (int64_t k = 0; k < depth; k++)
                sum += double(left.at(left_transposed ? k * rows + r : r * depth + k)) *
                       right.at(right_transposed ? c * depth + k : k * columns + c);
            worst = std::max(worst, std::abs(product.at(r * columns + c) - sum));
            largest = std::max(largest, std::abs(sum));
        }
    return worst / largest;
}

// A residual block in training with every other pass: how far its gradients are from those of a scale that norms take away. If
// the first weight is multiplied by a number, outputs stay and so does the product of weight and gradient, which is zero.
double branch_error() {
    const int64_t images = pick(1, 3), height = pick(5, 9), width = pick(5, 9), rows = images * height * width;
    const int64_t channels = pick(4, 40), wide = pick(1, 40);
    const int threads = pick(1, 3), kernels = pick(0, 2);
    Floats x(rows * channels), y(rows * channels), grad(rows * channels), grad_x(rows * channels), scales(images);
    Floats first(wide * channels), second(channels * wide), grad_first(wide * channels), grad_second(channels * wide);
    std::vector<std::unique_ptr<Floats>> of_norms;
    const auto floats = [&](int64_t count) { return of_norms.emplace_back(std::make_unique<Floats>(count))->data(); };
    rk_branch b = {};
    b.rows = rows, b.images = images, b.channels = channels, b.width = wide;
    b.activation = pick({RK_RELU, RK_GELU}), b.threads = threads;
    b.first = first.data(), b.second = second.data();
    b.grad_first = grad_first.data(), b.grad_second = grad_second.data();
    for (int i = 0; i < 5; i++) {
        const int64_t size = i % 4 ? wide : channels;
        b.norms[i] = {floats(size), floats(size), floats(size), floats(size), nullptr, nullptr,
                      nullptr,      floats(size), floats(size), 1e-12f,       0};
    }
    rk_problem passes[2][3];
    rk_depthwise depthwise[2];
    for (int k = 0; k < kernels; k++) {
        const int32_t size = int32_t(k ? 3 : pick({3, 5, 7}));
        const int64_t strides[] = {height * width * wide, 1, width * wide, wide};
        for (int pass = 0; pass < 3; pass++) {
            rk_problem& p = passes[k][pass];
            p = {images, wide, height, width, height, width, {}, {}, size, size, 1, 1, 1, 1, size / 2, size / 2,
                 pass,   pick({RK_DIRECT, RK_FFT}), RK_F32, 0, 0, threads};
            std::copy(strides, strides + 4, p.input_stride);
            std::copy(strides, strides + 4, p.output_stride);
        }
        depthwise[k] = {&passes[k][0], &passes[k][1], &passes[k][2], floats(wide * size * size), floats(wide * size * size)};
    }
    b.large = kernels > 0 ? &depthwise[0] : nullptr;
    b.small = kernels > 1 ? &depthwise[1] : nullptr;
    b.image_scales = pick(0, 1) ? scales.data() : nullptr;
    Floats maps(rk_branch_map_floats(&b));
    b.input = x.data(), b.output = y.data(), b.maps = maps.data();
    if (rk_branches_forward(&b, 1) || rk_branches_backward(&b, 1, grad.data(), grad_x.data())) return INFINITY;
    double worst = 0;
    for (int64_t o = 0; o < wide; o++) {
        double product = 0, sizes = 0;
        for (int64_t i = o * channels; i < (o + 1) * channels; i++) {
            product += first.at(i) * grad_first.at(i);
            sizes += std::abs(first.at(i) * grad_first.at(i));
        }
        worst = std::max(worst, std::abs(product) / (sizes + 1e-2));
    }
    return worst;
}

}  // namespace

int main(int argc, char** argv) {
    const int problems = argc > 1 ? std::atoi(argv[1]) : 200, seed = argc > 2 ? std::atoi(argv[2]) : 0;
    std::stringstream isas(rk_available_isas());
    int failures = 0;
    for (std::string isa; std::getline(isas, isa, ',');) {
        if (rk_force_isa(isa.c_str()) || isa != rk_isa()) {
            std::printf("cannot force %s\n", isa.c_str());
            return 1;
        }
        rng.seed(unsigned(seed));
        Check check = {isa.c_str()};
        for (int i = 0; i < problems; i++) check.problem(i % 2 ? RK_FFT : RK_DIRECT);
        for (int i = 0; i < problems / 4; i++) check.problem(RK_DIRECT, true);
        std::printf("%s: %d direct, %d fft; worst float32 error: forward %.2g, grad_input %.2g, grad_weight %.2g\n",
                    isa.c_str(), check.runs[0], check.runs[1], check.worst[0], check.worst[1], check.worst[2]);
        const auto check_all = [&](const char* what, double (*error_of_one)(), double bound) {
            double worst = 0;
            for (int i = 0; i < problems; i++) {
                const double error = error_of_one();
                worst = std::max(worst, error);
                failures += !(error <= bound);
            }
            std::printf("%s: %d %s; worst error %.2g\n", isa.c_str(), problems, what, worst);
        };
        check_all("batch norms", norm_error, 2e-5);
        check_all("pointwise", pointwise_error, 5e-6);
        check_all("blocks", blocks_error, 0);
        check_all("products of matrices", matmul_error, 2e-6);
        check_all("residual blocks in training", branch_error, 2e-4);
        failures += check.failures + (check.runs[RK_DIRECT] < problems / 3);
    }
    return failures ? 1 : 0;
}

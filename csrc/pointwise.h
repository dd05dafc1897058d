// Pointwise (1x1) convolution, and two of them with the hidden rows in cache.
#pragma once

#include "pointwise_rows.h"
#include "pointwise_strassen.h"

namespace RK_ISA {
namespace pointwise {

static Product product(const rk_layer& layer, int64_t rows, const float* input, const float* residual,
                       float* output) {
    return {input,
            input && rows * layer.in_channels > kCachedFloats,
            layer.weight,
            layer.bias,
            residual,
            output,
            layer.in_channels,
            layer.out_channels,
            layer.in_channels,
            layer.out_channels,
            layer.activation};
}

static int one(const rk_layer* layer, int64_t images, int64_t pixels, const float* input, const float* residual,
               float* output, int threads) {
    const int64_t rows = images * pixels;
    if (!rows) return RK_OK;
    const Product p = product(*layer, rows, input, residual, output);
    return strassen_pays(*layer, pixels) ? by_strassen(p, nullptr, rows, threads) : one_by_rows(p, rows, threads);
}

static int pair(const rk_layer* first, const rk_layer* second, int64_t images, int64_t pixels, const float* input,
                const float* residual, float* output, int threads) {
    const int64_t rows = images * pixels;
    if (!rows) return RK_OK;
    const Product up = product(*first, rows, input, nullptr, nullptr);
    const Product down = product(*second, rows, nullptr, residual, output);
    if (strassen_pays(*first, pixels) && strassen_pays(*second, pixels)) return by_strassen(up, &down, rows, threads);
    const bool hidden_outweighs = rows > first->in_channels + second->out_channels;  // the weights of both layers
    return (hidden_outweighs ? pair_by_rows : pair_by_layers)(up, down, rows, threads);
}

}  // namespace pointwise
}  // namespace RK_ISA

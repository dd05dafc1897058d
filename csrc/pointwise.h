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

static bool suits_strassen(const Products& c) {
    return strassen_pays(*c.first, c.pixels) && (!c.second || strassen_pays(*c.second, c.pixels));
}

// Whether each thread takes some rows through both layers: hidden channels outweigh the weights.
static bool suits_rows(const Products& c) {
    return c.images * c.pixels > c.first->in_channels + c.second->out_channels;
}

static int64_t workspace_floats(const Products& c, int64_t rows) {
    const Product first = product(*c.first, rows, nullptr, nullptr, nullptr);
    if (!c.second)
        return suits_strassen(c) ? by_strassen_floats(first, nullptr, rows, c.threads)
                                 : one_by_rows_floats(first, c.threads);
    const Product second = product(*c.second, rows, nullptr, nullptr, nullptr);
    if (suits_strassen(c)) return by_strassen_floats(first, &second, rows, c.threads);
    if (suits_rows(c)) return pair_by_rows_floats(first, second, rows, c.threads);
    return pair_by_layers_floats(first, second, rows, c.threads);
}

static size_t workspace_bytes(const Products& c) {
    const int64_t rows = c.images * c.pixels;
    return rows ? workspace_floats(c, rows) * sizeof(float) : 0;
}

static void run(const Products& c, const float* input, const float* residual, float* output, float* workspace) {
    const int64_t rows = c.images * c.pixels;
    if (!rows) return;
    if (!c.second) {
        const Product p = product(*c.first, rows, input, residual, output);
        return suits_strassen(c) ? by_strassen(p, nullptr, rows, c.threads, workspace)
                                 : one_by_rows(p, rows, c.threads, workspace);
    }
    const Product first = product(*c.first, rows, input, nullptr, nullptr);
    const Product second = product(*c.second, rows, nullptr, residual, output);
    if (suits_strassen(c)) return by_strassen(first, &second, rows, c.threads, workspace);
    if (suits_rows(c)) return pair_by_rows(first, second, rows, c.threads, workspace);
    pair_by_layers(first, second, rows, c.threads, workspace);
}

}  // namespace pointwise
}  // namespace RK_ISA

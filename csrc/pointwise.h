// Pointwise (1x1) convolution, and two of them with the hidden rows in cache.
#pragma once

#ifdef RK_AMX
#include "pointwise_amx.h"
#endif
#ifdef RK_PAIRS
#include "pointwise_pairs.h"
#endif
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
            layer.in_channels,
            layer.activation,
            layer.input_sizes,
            layer.output_sizes,
            layer.pair_sums};
}

// A way to compute one product, or two of which the second reads what the first writes.
struct Method {
    int64_t (*workspace_floats)(const Product& first, const Product* second, int64_t rows, int threads);
    void (*run)(const Product& first, const Product* second, int64_t rows, int threads, float* workspace);
};

// The method for some layers, none of whose results depend on the number of images and threads: by rows if each thread
// had better take some rows through all layers, as the rows outweigh the weights.
static Method method_of(const Products& c) {
    const rk_layer &first = *c.first, &last = c.second ? *c.second : first;
    const bool divided = first.input_sizes || last.input_sizes;
    const bool by_rows = c.images * c.pixels > first.in_channels + last.out_channels;
#ifdef RK_AMX
    if (!divided && amx_pays(first, c.pixels) && amx_pays(last, c.pixels))
        return by_rows ? Method{amx_by_rows_floats, amx_by_rows} : Method{amx_by_layers_floats, amx_by_layers};
#endif
#ifdef RK_PAIRS
    if (pairs_pay(first, c.pixels) && pairs_pay(last, c.pixels))
        return pairs_by_rows_pay(c.images * c.pixels, c.threads) ? Method{pairs_by_rows_floats, pairs_by_rows}
                                                                 : Method{pairs_by_layers_floats, pairs_by_layers};
#endif
    if (!divided && strassen_pays(first, c.pixels) && strassen_pays(last, c.pixels))
        return strassen_by_rows_pays(c.images * c.pixels, c.threads)
                   ? Method{strassen_by_rows_floats, strassen_by_rows}
                   : Method{strassen_by_layers_floats, strassen_by_layers};
    if (!c.second) return {one_by_rows_floats, one_by_rows};
    return by_rows ? Method{pair_by_rows_floats, pair_by_rows} : Method{pair_by_layers_floats, pair_by_layers};
}

static size_t workspace_bytes(const Products& c) {
    const int64_t rows = c.images * c.pixels;
    if (!rows) return 0;
    const Product first = product(*c.first, rows, nullptr, nullptr, nullptr);
    const Product second = product(c.second ? *c.second : *c.first, rows, nullptr, nullptr, nullptr);
    return method_of(c).workspace_floats(first, c.second ? &second : nullptr, rows, c.threads) * sizeof(float);
}

static void run(const Products& c, const float* input, const float* residual, float* output, float* workspace) {
    const int64_t rows = c.images * c.pixels;
    if (!rows) return;
    const Method method = method_of(c);
    if (!c.second) return method.run(product(*c.first, rows, input, residual, output), nullptr, rows, c.threads, workspace);
    const Product second = product(*c.second, rows, nullptr, residual, output);
    method.run(product(*c.first, rows, input, nullptr, nullptr), &second, rows, c.threads, workspace);
}

}  // namespace pointwise
}  // namespace RK_ISA

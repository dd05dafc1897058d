// Table of what one instruction set offers; kernels.cpp defines one per instruction set.
#pragma once

#include "replknet_core.h"

// Arguments of rk_run, with the workspace of all threads: thread t owns `workspace + t * stride`.
struct Call {
    const rk_problem* problem;
    void* input;
    float* weight;
    const void* spectrum;
    const float* bias;
    void* output;
    char* workspace;
    size_t workspace_stride;
};

struct Algorithm {
    bool (*supports)(const rk_problem&);
    size_t (*workspace_bytes)(const rk_problem&);  // of one thread
    size_t (*spectrum_bytes)(const rk_problem&);
    void (*prepare)(const Call&);  // writes call.spectrum from call.weight; null without spectra
    void (*run)(const Call&);
};

// A pointwise layer on contiguous rows, or two of which the second reads what the first writes.
struct Products {
    const rk_layer *first, *second;  // second: or null
    int64_t images, pixels;
    int threads;
};

// left @ right; see rk_matmul.
struct MatrixProduct {
    const rk_matrix *left, *right;
    int64_t rows, columns, depth;
    int threads;
};

// Batch norms of as many inputs, one or two, whose results are added up, and the activation behind; see rk_norm_forward.
struct Norms {
    int64_t rows, channels;
    int count, activation, threads;
    rk_norm norm[2];
    const float* input[2];
};

// What happens to the result: `residual` + the scale of each image * result. Both may be null.
struct Residual {
    const float* residual;
    const float* image_scales;
    int64_t image_rows;

    float scale(int64_t row) const { return image_scales ? image_scales[row / image_rows] : 1; }
};

struct Kernels {
    const char* isa;
    const Algorithm& (*algorithms[2])();  // indexed by RK_DIRECT, RK_FFT
    double (*fma_peak)(int threads);
    size_t (*pointwise_bytes)(const Products&);
    void (*pointwise)(const Products&, const float* input, const float* residual, float* output, float* workspace);
    size_t (*pair_sum_bytes)(const rk_layer&);  // null where products are not by pairs of channels
    void (*sum_pairs)(const rk_layer&, float* sums);
    size_t (*matmul_bytes)(const MatrixProduct&);
    void (*matmul)(const MatrixProduct&, float* output, float* workspace);
    int (*norm_forward)(const Norms&, const Residual&, float* output);
    // Here the scales multiply grad_output, and `residual` is added to the gradient of each input. That of the first input may be
    // written over grad_output.
    int (*norm_backward)(const Norms&, const Residual&, const float* grad_output, float* const* grad_input);
};

#define RK_DECLARE_KERNELS(isa) extern "C" const Kernels rk_kernels_##isa

/* The C interface of the native core: depthwise convolution on CPU tensors of any strides.
 *
 * Nothing here keeps memory, state or a reference after it returns, except rk_force_isa. All functions may be
 * called from any number of threads at once. */
#ifndef REPLKNET_CORE_H
#define REPLKNET_CORE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define RK_API __declspec(dllexport)
#else
#define RK_API __attribute__((visibility("default")))
#endif

enum { RK_FORWARD = 0, RK_GRAD_INPUT = 1, RK_GRAD_WEIGHT = 2 };
enum { RK_DIRECT = 0, RK_FFT = 1 };
enum { RK_F32 = 0, RK_BF16 = 1, RK_F16 = 2 };
enum { RK_OK = 0, RK_UNSUPPORTED = 1, RK_OUT_OF_MEMORY = 2 };

/* One pass of one depthwise convolution. Strides are in elements, in the order n, c, h, w. "input" is the
 * layer's input or the gradient with respect to it, "output" the layer's output or the gradient with respect to
 * it. The weight and its gradient are contiguous (C, Kh, Kw), bias is (C); both, in every pass, are float32.
 * Of a forward pass the weight may be packed: RK_FILTER_LANES channels after each other, each time (Kh, Kw,
 * RK_FILTER_LANES), the last ones filled up with zeros. dtype is that of input and output. All sizes are at least 1. */
enum { RK_FILTER_LANES = 16 };

typedef struct rk_problem {
    int64_t batch, channels, in_h, in_w, out_h, out_w;
    int64_t input_stride[4], output_stride[4];
    int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
    int32_t pass, algorithm, dtype, relu, packed_weight, threads;
} rk_problem;

/* RK_OK, or RK_UNSUPPORTED. */
RK_API int rk_supports(const rk_problem* problem);

/* Bytes of workspace of one thread, allocated and freed by rk_run. */
RK_API size_t rk_workspace_bytes(const rk_problem* problem);

/* Bytes of the filter spectra that rk_prepare writes; 0 where the algorithm has none. */
RK_API size_t rk_spectrum_bytes(const rk_problem* problem);

/* Transform the filters of a forward problem once, for many calls of rk_run. `spectrum` is aligned to 64.
 * RK_UNSUPPORTED where there is none. */
RK_API int rk_prepare(const rk_problem* problem, const float* weight, void* spectrum);

/* Compute a pass:
 *   forward      input, weight (or spectrum), bias or NULL  -> output
 *   grad_input   output gradient, weight                    -> input gradient
 *   grad_weight  input, output gradient                     -> weight gradient
 * `spectrum` may be NULL; when given, `weight` is not read. */
RK_API int rk_run(const rk_problem* problem, void* input, float* weight, const void* spectrum, const float* bias,
                  void* output);

enum { RK_IDENTITY = 0, RK_RELU = 1, RK_GELU = 2 };
enum { RK_PANEL = 16, RK_COLUMNS = 32 };

/* One pointwise (1x1) convolution of float32 pixels. `weight` is packed: panels of RK_PANEL output channels, each
 * (in_channels, RK_PANEL); it and `bias` are filled up with zeros to a multiple of RK_COLUMNS output channels.
 * The sizes are powers of two by which the weights of an input and an output channel have been divided, for instruction sets
 * that need factors of one size (zen4), or both NULL. `output_sizes` is filled up like the bias. `pair_sums` is what rk_sum_pairs
 * writes, or NULL. */
typedef struct rk_layer {
    const float* weight;
    const float* bias;
    int64_t in_channels, out_channels;
    int32_t activation;
    const float *input_sizes, *output_sizes, *pair_sums;
} rk_layer;

/* Bytes of the sums that rk_sum_pairs writes; 0 for layers and instruction sets that do without. */
RK_API size_t rk_pair_sum_bytes(const rk_layer* layer);

/* Sum up once, for many calls, what depends on the (divided) weights alone of a layer that is computed by pairs of channels.
 * RK_UNSUPPORTED for instruction sets that do without. */
RK_API int rk_sum_pairs(const rk_layer* layer, float* pair_sums);

/* output = activation(input @ weight + bias) + residual. The input is contiguous (images, pixels, in_channels); output
 * and residual, which may be NULL or the output itself, are (images, pixels, out_channels). The results of an image
 * depend on nothing but that image and the number of its pixels. */
RK_API int rk_pointwise(const rk_layer* layer, int64_t images, int64_t pixels, const float* input, const float* residual,
                        float* output, int threads);

/* second(first(input)) + residual, without a tensor between the two. All three tensors may be the same. */
RK_API int rk_pointwise_pair(const rk_layer* first, const rk_layer* second, int64_t images, int64_t pixels,
                             const float* input, const float* residual, float* output, int threads);

/* A residual block: second(large_kernel(first(x))) + x, or second(first(x)) + x where `large_kernel` is NULL. The large
 * kernel is a forward problem of the images in channels-last order that keeps their size; `filters`, `spectra` and `bias`
 * are what rk_run takes. */
typedef struct rk_block {
    rk_layer first, second;
    const rk_problem* large_kernel;
    float* filters;
    const void* spectra;
    const float* bias;
} rk_block;

/* The blocks one after the other, at least one; input and output are (images, pixels, channels). `large_kernel_seconds`
 * may be NULL, or becomes the time of their large kernels together. */
RK_API int rk_blocks(const rk_block* blocks, int64_t count, int64_t images, int64_t pixels, const float* input,
                     float* output, int threads, double* large_kernel_seconds);

/* A float32 matrix of rows that are `stride` floats apart; `transposed`: rows are the columns of what is meant. */
typedef struct rk_matrix {
    const float* data;
    int64_t stride;
    int32_t transposed;
} rk_matrix;

/* product (rows, columns), contiguous, = left (rows, depth) @ right (depth, columns), as exact as sums of float32 products, or
 * for zen4 about that. All sizes are at least 1. */
RK_API int rk_matmul(const rk_matrix* left, const rk_matrix* right, int64_t rows, int64_t columns, int64_t depth,
                     float* product, int threads);

/* A batch norm with the statistics of the batch. `weight` and `bias` may be NULL for ones and zeros. `mean` and the biased
 * `variance` are written by a forward pass and read by the backward pass. The running statistics, both NULL or both not, and the
 * count of batches, which may be NULL, are moved by a forward pass: the former by `momentum` towards those of the batch. */
typedef struct rk_norm {
    const float *weight, *bias;
    float *mean, *variance;
    float *running_mean, *running_variance;
    int64_t* batches;
    float *grad_weight, *grad_bias;
    float eps, momentum;
} rk_norm;

/* output = activation((input - mean) / sqrt(variance + eps) * weight + bias), of contiguous float32 rows (pixels), at least one. */
RK_API int rk_norm_forward(const rk_norm* norm, int64_t rows, int64_t channels, int activation, const float* input,
                           float* output, int threads);

/* The gradients; that of the input may be written over that of the output. */
RK_API int rk_norm_backward(const rk_norm* norm, int64_t rows, int64_t channels, int activation, const float* input,
                            const float* grad_output, float* grad_input, int threads);

/* A depthwise convolution in training: its three passes on channels-last images. */
typedef struct rk_depthwise {
    const rk_problem *forward, *grad_input, *grad_weight;
    const float* weight;
    float* weight_gradient;
} rk_depthwise;

/* What takes time in residual blocks: norms with their activations and sums, 1x1 convolutions, the two kernels. */
enum { RK_NORMS = 0, RK_PRODUCTS = 1, RK_LARGE = 2, RK_SMALL = 3, RK_KINDS = 4 };

/* A residual block in training, on contiguous float32 rows (pixels of all images):
 *
 *     output = input + image_scales * norms[4](second(inside(activation(norms[1](first(norms[0](input)))))))
 *
 * where `first` and `second` are 1x1 convolutions, their weights (width, channels) and (channels, width), and what is inside is
 * nothing if `large` is NULL, else relu(norms[2](large(..))), or relu(norms[2](large(..)) + norms[3](small(..))) if `small` is
 * not NULL. `image_scales`, one for each image, may be NULL for ones. `maps` is memory for rk_branch_map_floats numbers, which
 * a forward pass writes and the backward pass reads. Each pass adds its time by kind to `seconds`, of RK_KINDS, unless that is
 * NULL. */
typedef struct rk_branch {
    int64_t rows, images, channels, width;
    int32_t activation, threads;
    const float *first, *second;
    float *grad_first, *grad_second;
    const rk_depthwise *large, *small;
    rk_norm norms[5];
    const float* image_scales;
    const float* input;
    float *output, *maps;
    double* seconds;
} rk_branch;

RK_API int64_t rk_branch_map_floats(const rk_branch* branch);

/* Blocks of the same rows and channels, at least one. RK_UNSUPPORTED where a pass of a depthwise convolution is not native. */
RK_API int rk_branches_forward(const rk_branch* branches, int64_t count);

/* The gradients of all parameters and of the first input, after the outputs of the forward pass are inputs of what follows. */
RK_API int rk_branches_backward(const rk_branch* branches, int64_t count, const float* grad_output, float* grad_input);

/* Comma-separated instruction sets that are compiled in and that this machine executes, best first. */
RK_API const char* rk_available_isas(void);

/* The instruction set in use. */
RK_API const char* rk_isa(void);

/* Use one instruction set from now on; NULL or "" for the best. RK_UNSUPPORTED if it is not available. */
RK_API int rk_force_isa(const char* name);

/* Float32 multiply-adds a second, times two, that `threads` threads reach in registers: the roofline. */
RK_API double rk_fma_peak(int threads);

#ifdef __cplusplus
}
#endif
#endif

// Pointwise (1x1) convolution: rows of pixels times a packed weight, and two of them with the hidden rows in cache.
//
// A tile of kTileRows pixels by 2 vectors of channels stays in registers over the whole depth; its weights stream
// from a packed panel, its pixels are broadcast from their own rows. Every output is one sum in the order of the
// input channels, so results depend neither on the number of threads nor on the tiling.
#pragma once

#include <omp.h>
#include <stdlib.h>

#include "activation.h"
#include "kernels.h"

namespace RK_ISA {
namespace pointwise {

constexpr int64_t kPanel = RK_PANEL;
constexpr int64_t kTileColumns = 2 * kLanes;
#if RK_LANES == 16 || defined(__aarch64__)  // 32 vector registers
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int64_t kCachedFloats = 1024 * 1024 / 4;  // rows that a thread walks through for every panel: 1 MiB

struct Product {
    const float* input;
    const float* packed;
    const float* bias;
    const float* residual;  // or null; its rows are as far apart as the output's
    float* output;
    int64_t input_stride, output_stride;
    int64_t depth, columns;
    int activation;
};

struct Span {
    int64_t begin, end;
};

static RK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static RK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static RK_INLINE Span part(int64_t size, int64_t parts, int64_t i) {
    return {size * i / parts, size * (i + 1) / parts};
}

// What a tile brings into the caches for those after it, while it computes.
struct Fetch {
    const float* weights;  // of the next panel, into the second level: `lines` of them for every kStep channels
    int64_t lines;
    const float* rows;  // of the next tile, into the first level; or null
};
constexpr int64_t kStep = 4, kLine = 16;

// sum[kRows][2] += one channel of the rows times its weights
template <int kRows>
static RK_INLINE void add_channel(Vec (*sum)[2], const float* input, int64_t stride, const float* weights) {
    const Vec left = load(weights), right = load(weights + kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) {
        const Vec x = broadcast(input[row * stride]);
        sum[row][0] += x * left;
        sum[row][1] += x * right;
    }
}

// block[kRows][kTileColumns] = bias + input rows @ packed columns
template <int kRows>
static void multiply(const float* input, int64_t stride, const float* packed, int64_t depth, const float* bias,
                     float* block, Fetch fetch) {
    Vec sum[kRows][2];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) {
        sum[row][0] = load(bias);
        sum[row][1] = load(bias + kLanes);
    }
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep) {
        for (int64_t line = 0; line < fetch.lines; line++, fetch.weights += kLine)
            __builtin_prefetch(fetch.weights, 0, 2);
        if (fetch.rows)
            for (int line = 0; line < kStep; line++) __builtin_prefetch(fetch.rows + (k + line) * kLine);
#pragma GCC unroll 4
        for (int64_t i = k; i < k + kStep; i++) add_channel<kRows>(sum, input + i, stride, packed + i * kPanel);
    }
    for (; k < depth; k++) add_channel<kRows>(sum, input + k, stride, packed + k * kPanel);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) {
        store(block + row * kTileColumns, sum[row][0]);
        store(block + row * kTileColumns + kLanes, sum[row][1]);
    }
}

template <int kRows>
static RK_INLINE void multiply_rows(int rows, const float* input, int64_t stride, const float* packed, int64_t depth,
                                    const float* bias, float* block, const Fetch& fetch) {
    if (rows == kRows)
        multiply<kRows>(input, stride, packed, depth, bias, block, fetch);
    else if constexpr (kRows > 1)
        multiply_rows<kRows - 1>(rows, input, stride, packed, depth, bias, block, fetch);
}

// Activation and residual on the way from the block to the output.
static void finish(const Product& p, const float* block, int64_t row, int rows, int64_t column) {
    const int64_t valid = smaller(kTileColumns, p.columns - column);
    for (int r = 0; r < rows; r++) {
        float* output = p.output + (row + r) * p.output_stride + column;
        const float* residual = p.residual ? p.residual + (row + r) * p.output_stride + column : nullptr;
        for (int64_t c = 0; c < valid; c += kLanes) {
            Vec v = load(block + r * kTileColumns + c);
            if (p.activation == RK_RELU) v = max_with_zero(v);
            if (p.activation == RK_GELU) v = gelu(v);
            const int lanes = int(smaller(kLanes, valid - c));
            if (lanes == kLanes) {
                store(output + c, residual ? v + load(residual + c) : v);
            } else {
                store_some(output + c, residual ? v + load_some(residual + c, lanes) : v, lanes);
            }
        }
    }
}

// Rows at a stride that maps them all to the same cache sets evict each other before they are used up.
static RK_INLINE bool rows_collide(const Product& p) {
    return p.depth > 512 && p.input_stride * sizeof(float) % 2048 == 0;
}

static RK_INLINE int64_t padded(int64_t depth) { return ceil_div(depth, 16) * 16 + 16; }
static RK_INLINE int64_t cached_rows(int64_t depth) {
    const int64_t tiles = kCachedFloats / (depth * kTileRows);
    return (tiles > 1 ? tiles : 1) * kTileRows;
}

// Weights of `channels` input channels, in one panel: what a thread will read after those it is reading.
struct Upcoming {
    const float* weights;
    int64_t channels;
};

static RK_INLINE Upcoming panel_of(const Product& p, int64_t panel) {
    return {p.packed + panel * kPanel * p.depth, p.depth};
}

// The share in fetching a panel that one of `tiles` tiles over `depth` channels has.
static RK_INLINE Fetch fetch_part(Upcoming upcoming, int64_t tile, int64_t tiles, int64_t depth) {
    const int64_t lines = upcoming.channels * kPanel / kLine, steps = ceil_div(depth, kStep);
    const int64_t each = ceil_div(lines, tiles * steps), first = tile * steps * each;
    return {upcoming.weights + first * kLine, first < lines ? each : 0, nullptr};
}

// The product of some rows with some panels, on the calling thread, before it goes on to `then`. `copy` holds
// cached_rows(depth) padded rows.
static void compute(const Product& p, Span rows, Span panels, Upcoming then, float* copy) {
    const int64_t blocks = ceil_div(rows.end - rows.begin, cached_rows(p.depth));
    const bool collide = rows_collide(p);
    alignas(64) float block[kTileRows * kTileColumns];
    for (int64_t b = 0; b < blocks; b++) {
        const Span span = part(rows.end - rows.begin, blocks, b);
        const int64_t first = rows.begin + span.begin, count = span.end - span.begin;
        const float* input = p.input + first * p.input_stride;
        int64_t stride = p.input_stride;
        if (collide) {
            stride = padded(p.depth);
            for (int64_t r = 0; r < count; r++)
                memcpy(copy + r * stride, input + r * p.input_stride, p.depth * sizeof(float));
            input = copy;
        }
        const int64_t tiles = ceil_div(count, kTileRows);
        for (int64_t panel = panels.begin; panel < panels.end; panel++) {
            const bool last = panel + 1 == panels.end, again = b + 1 < blocks;
            const Upcoming upcoming = last && !again ? then : panel_of(p, last ? panels.begin : panel + 1);
            for (int64_t t = 0; t < tiles; t++) {
                const Span tile = part(count, tiles, t);
                const int height = int(tile.end - tile.begin);
                Fetch fetch = fetch_part(upcoming, t, tiles, p.depth);
                // On the first pass the rows come from memory too.
                if (panel == panels.begin && !collide) fetch.rows = input + tile.end * stride;
                for (int64_t c = 0; c < kPanel && panel * kPanel + c < p.columns; c += kTileColumns) {
                    const int64_t column = panel * kPanel + c;
                    const float* packed = p.packed + panel * kPanel * p.depth + c;
                    multiply_rows<kTileRows>(height, input + tile.begin * stride, stride, packed, p.depth,
                                             p.bias + column, block, fetch);
                    finish(p, block, first + tile.begin, height, column);
                    fetch.lines = 0;
                }
            }
        }
    }
}

// Floats that one thread needs for `compute`.
static int64_t copy_floats(const Product& p) {
    return rows_collide(p) ? cached_rows(p.depth) * padded(p.depth) : 0;
}

// The whole product, called by every thread of a parallel region; ends with a barrier. The smaller of weight and
// pixels is what every thread reads in full. `next` is the product after it.
static void compute_shared(const Product& p, const Product& next, int64_t rows, int threads, float* copy) {
    const int64_t panels = ceil_div(p.columns, kPanel), tiles = ceil_div(rows, kTileRows);
    const Upcoming then = panel_of(next, smaller(omp_get_thread_num(), ceil_div(next.columns, kPanel) - 1));
    if (p.columns > rows) {
        // Panel by panel, unless the rows are copied for each part.
        const int64_t parts = rows_collide(p) ? smaller(panels, 2 * threads) : panels;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < parts; i++) {
            const bool more = i + threads < parts;
            compute(p, {0, rows}, part(panels, parts, i),
                    more ? panel_of(p, part(panels, parts, i + threads).begin) : then, copy);
        }
    } else {
        const int64_t most = ceil_div(tiles * kTileRows, cached_rows(p.depth));
        const int64_t parts = smaller(tiles, most > 4 * threads ? most : 4 * threads);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < parts; i++) {
            const Span span = part(tiles, parts, i);
            compute(p, {span.begin * kTileRows, smaller(span.end * kTileRows, rows)}, {0, panels}, panel_of(p, 0),
                    copy);
        }
    }
}

static Product product(const rk_layer& layer, const float* input, const float* residual, float* output) {
    return {input,
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

static float* allocate(int64_t floats) {
    return static_cast<float*>(aligned_alloc(64, ceil_div(floats + 1, 16) * 64));
}

static int one(const rk_layer* layer, int64_t rows, const float* input, const float* residual, float* output,
               int threads) {
    const Product p = product(*layer, input, residual, output);
    const int64_t own = copy_floats(p);
    float* workspace = allocate(own * threads);
    if (!workspace) return RK_OUT_OF_MEMORY;
#pragma omp parallel num_threads(threads)
    compute_shared(p, p, rows, threads, workspace + omp_get_thread_num() * own);
    free(workspace);
    return RK_OK;
}

// Every thread takes some rows through both layers; their hidden channels never leave its cache.
static int pair_by_rows(Product first, Product second, int64_t rows, int threads) {
    const int64_t hidden_stride = padded(second.depth), copy = copy_floats(first);
    const int64_t share = ceil_div(ceil_div(rows, 4 * threads), kTileRows) * kTileRows;
    const int64_t block = smaller(cached_rows(second.depth), share);
    const int64_t own = copy + block * hidden_stride;
    float* workspace = allocate(own * threads);
    if (!workspace) return RK_OUT_OF_MEMORY;
    const int64_t first_panels = ceil_div(first.columns, kPanel), second_panels = ceil_div(second.columns, kPanel);
#pragma omp parallel num_threads(threads)
    {
        float* mine = workspace + omp_get_thread_num() * own;
        Product up = first, down = second;
        down.input = up.output = mine + copy;
        down.input_stride = up.output_stride = hidden_stride;
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < rows; begin += block) {
            const int64_t count = smaller(block, rows - begin);
            up.input = first.input + begin * first.input_stride;
            down.output = second.output + begin * second.output_stride;
            if (second.residual) down.residual = second.residual + begin * second.output_stride;
            compute(up, {0, count}, {0, first_panels}, panel_of(down, 0), mine);
            compute(down, {0, count}, {0, second_panels}, panel_of(up, 0), mine);
        }
    }
    free(workspace);
    return RK_OK;
}

// One layer after the other: each thread reads all rows and its part of the weights.
static int pair_by_layers(Product first, Product second, int64_t rows, int threads) {
    const int64_t hidden_stride = padded(second.depth), own = copy_floats(first);
    float* workspace = allocate(own * threads + rows * hidden_stride);
    if (!workspace) return RK_OUT_OF_MEMORY;
    first.output = workspace + own * threads;
    second.input = first.output;
    first.output_stride = second.input_stride = hidden_stride;
#pragma omp parallel num_threads(threads)
    {
        float* mine = workspace + omp_get_thread_num() * own;
        compute_shared(first, second, rows, threads, mine);
        compute_shared(second, first, rows, threads, mine);
    }
    free(workspace);
    return RK_OK;
}

static int pair(const rk_layer* first, const rk_layer* second, int64_t rows, const float* input,
                const float* residual, float* output, int threads) {
    const Product up = product(*first, input, nullptr, nullptr), down = product(*second, nullptr, residual, output);
    const bool hidden_outweighs = rows > first->in_channels + second->out_channels;  // the weights of both layers
    return (hidden_outweighs ? pair_by_rows : pair_by_layers)(up, down, rows, threads);
}

}  // namespace pointwise
}  // namespace RK_ISA

// Pointwise (1x1) convolution: rows of pixels times a packed weight, and two of them with the hidden rows in cache.
//
// A tile of kTileRows pixels by 2 vectors of channels stays in registers over up to kDepth channels, whose weights
// stay in the first level cache for the tiles below it; its pixels are broadcast from their own rows. Every output is
// one sum in the order of the input channels, so results depend neither on the number of threads nor on the tiling.
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
constexpr int64_t kDepth = 16 * 1024 / 4 / kTileColumns;  // channels whose weights for a tile are 16 KiB
constexpr int64_t kCachedFloats = 1024 * 1024 / 4;  // rows that a thread walks through for every panel: 1 MiB

struct Product {
    const float* input;
    bool from_memory;  // rather than from the caches
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
static RK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
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
constexpr int kRowLines = (kTileRows * kStep + kLine - 1) / kLine;  // of a tile, for every kStep channels

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

// Rows of kTileColumns floats, `stride` apart.
struct Start {
    const float* rows;
    int64_t stride;
};

// block[kRows][kTileColumns] = start + input rows @ packed columns
template <int kRows, bool kFetch>
static void multiply(const float* input, int64_t stride, const float* packed, int64_t depth, const Start& start,
                     float* block, const Fetch& fetch) {
    Vec sum[kRows][2];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) {
        sum[row][0] = load(start.rows + row * start.stride);
        sum[row][1] = load(start.rows + row * start.stride + kLanes);
    }
    const float *weights = fetch.weights, *rows = fetch.rows;
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep) {
        if constexpr (kFetch) {
            for (int64_t line = 0; line < fetch.lines; line++, weights += kLine) __builtin_prefetch(weights, 0, 2);
            if (rows)
                for (int line = 0; line < kRowLines; line++, rows += kLine) __builtin_prefetch(rows);
        }
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
                                    const Start& start, float* block, const Fetch& fetch) {
    if (rows == kRows)
        (fetch.lines || fetch.rows ? multiply<kRows, true> : multiply<kRows, false>)(input, stride, packed, depth, start,
                                                                                      block, fetch);
    else if constexpr (kRows > 1)
        multiply_rows<kRows - 1>(rows, input, stride, packed, depth, start, block, fetch);
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

// The share in fetching a panel that one of `shares` has, while it computes `depth` channels.
static RK_INLINE Fetch fetch_part(Upcoming upcoming, int64_t share, int64_t shares, int64_t depth) {
    const int64_t lines = upcoming.channels * kPanel / kLine, steps = ceil_div(depth, kStep);
    const int64_t each = ceil_div(lines, shares * steps), first = share * steps * each;
    return {upcoming.weights + first * kLine, first < lines ? each : 0, nullptr};
}

// Some rows of a product where they are read.
struct Rows {
    const float* data;
    int64_t stride, first, count;
};

static RK_INLINE int64_t depth_blocks(int64_t depth) { return ceil_div(depth, kDepth); }

// The product of some rows with one panel. `sums` holds sum_floats(depth).
static void compute_panel(const Product& p, const Rows& rows, int64_t panel, bool fetch_rows, Upcoming upcoming,
                          float* sums) {
    const float* packed = p.packed + panel * kPanel * p.depth;
    const int64_t columns = smaller(kPanel, p.columns - panel * kPanel);
    const int64_t tiles = ceil_div(rows.count, kTileRows), blocks = depth_blocks(p.depth);
    for (int64_t b = 0; b < blocks; b++) {
        const Span depth = part(p.depth, blocks, b);
        for (int64_t t = 0; t < tiles; t++) {
            const Span tile = part(rows.count, tiles, t);
            const int height = int(tile.end - tile.begin);
            const float* input = rows.data + tile.begin * rows.stride;
            Fetch fetch = fetch_part(upcoming, b * tiles + t, blocks * tiles, depth.end - depth.begin);
            if (fetch_rows && b == 0) fetch.rows = rows.data + tile.end * rows.stride;
            for (int64_t c = 0; c < columns; c += kTileColumns) {
                float* block = blocks > 1 ? sums + (t * kPanel + c) * kTileRows : sums;
                const int64_t column = panel * kPanel + c;
                const Start start = b ? Start{block, kTileColumns} : Start{p.bias + column, 0};
                multiply_rows<kTileRows>(height, input + depth.begin, rows.stride, packed + depth.begin * kPanel + c,
                                         depth.end - depth.begin, start, block, fetch);
                if (b + 1 == blocks) finish(p, block, rows.first + tile.begin, height, column);
                fetch.lines = 0;
                fetch.rows = nullptr;
            }
        }
    }
}

// Floats that one thread needs for `compute`: sums of a panel, and rows copied apart.
static RK_INLINE int64_t sum_floats(int64_t depth) {
    return kPanel * (depth_blocks(depth) > 1 ? cached_rows(depth) : kTileRows);
}
static RK_INLINE int64_t own_floats(const Product& p) {
    return sum_floats(p.depth) + (rows_collide(p) ? cached_rows(p.depth) * padded(p.depth) : 0);
}

// The product of some rows with some panels, on the calling thread, before it goes on to `then`. `own` holds
// own_floats(p).
static void compute(const Product& p, Span rows, Span panels, Upcoming then, float* own) {
    const int64_t blocks = ceil_div(rows.end - rows.begin, cached_rows(p.depth));
    for (int64_t b = 0; b < blocks; b++) {
        const Span span = part(rows.end - rows.begin, blocks, b);
        const int64_t first = rows.begin + span.begin, count = span.end - span.begin;
        Rows block{p.input + first * p.input_stride, p.input_stride, first, count};
        if (rows_collide(p)) {
            float* copy = own + sum_floats(p.depth);
            block.stride = padded(p.depth);
            for (int64_t r = 0; r < count; r++)
                memcpy(copy + r * block.stride, block.data + r * p.input_stride, p.depth * sizeof(float));
            block.data = copy;
        }
        for (int64_t panel = panels.begin; panel < panels.end; panel++) {
            const bool last = panel + 1 == panels.end, again = b + 1 < blocks;
            const Upcoming upcoming = last && !again ? then : panel_of(p, last ? panels.begin : panel + 1);
            const bool fetch_rows = p.from_memory && panel == panels.begin && !rows_collide(p);
            compute_panel(p, block, panel, fetch_rows, upcoming, own);
        }
    }
}

// The whole product, called by every thread of a parallel region; ends with a barrier. The smaller of weight and
// pixels is what every thread reads in full. `next` is the product after it.
static void compute_shared(const Product& p, const Product& next, int64_t rows, int threads, float* own) {
    const int64_t panels = ceil_div(p.columns, kPanel), tiles = ceil_div(rows, kTileRows);
    const Upcoming then = panel_of(next, smaller(omp_get_thread_num(), ceil_div(next.columns, kPanel) - 1));
    if (p.columns > rows) {
        // Panel by panel, unless the rows are copied for each part.
        const int64_t parts = rows_collide(p) ? smaller(panels, 2 * threads) : panels;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < parts; i++) {
            const bool more = i + threads < parts;
            compute(p, {0, rows}, part(panels, parts, i),
                    more ? panel_of(p, part(panels, parts, i + threads).begin) : then, own);
        }
    } else {
        const int64_t most = ceil_div(tiles * kTileRows, cached_rows(p.depth));
        const int64_t parts = smaller(tiles, most > 4 * threads ? most : 4 * threads);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < parts; i++) {
            const Span span = part(tiles, parts, i);
            compute(p, {span.begin * kTileRows, smaller(span.end * kTileRows, rows)}, {0, panels}, panel_of(p, 0), own);
        }
    }
}

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

static float* allocate(int64_t floats) {
    return static_cast<float*>(aligned_alloc(64, ceil_div(floats + 1, 16) * 64));
}

static int one(const rk_layer* layer, int64_t rows, const float* input, const float* residual, float* output,
               int threads) {
    const Product p = product(*layer, rows, input, residual, output);
    const int64_t own = own_floats(p);
    float* workspace = allocate(own * threads);
    if (!workspace) return RK_OUT_OF_MEMORY;
#pragma omp parallel num_threads(threads)
    compute_shared(p, p, rows, threads, workspace + omp_get_thread_num() * own);
    free(workspace);
    return RK_OK;
}

// Every thread takes some rows through both layers; their hidden channels never leave its cache.
static int pair_by_rows(Product first, Product second, int64_t rows, int threads) {
    const int64_t hidden_stride = padded(second.depth);
    const int64_t working = larger(own_floats(first), sum_floats(second.depth));
    const int64_t share = ceil_div(ceil_div(rows, 4 * threads), kTileRows) * kTileRows;
    const int64_t block = smaller(cached_rows(second.depth), share);
    const int64_t own = working + block * hidden_stride;
    float* workspace = allocate(own * threads);
    if (!workspace) return RK_OUT_OF_MEMORY;
    const int64_t first_panels = ceil_div(first.columns, kPanel), second_panels = ceil_div(second.columns, kPanel);
#pragma omp parallel num_threads(threads)
    {
        float* mine = workspace + omp_get_thread_num() * own;
        Product up = first, down = second;
        down.input = up.output = mine + working;
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
    const int64_t hidden_stride = padded(second.depth);
    const int64_t own = larger(own_floats(first), sum_floats(second.depth));
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
    const Product up = product(*first, rows, input, nullptr, nullptr);
    const Product down = product(*second, rows, nullptr, residual, output);
    const bool hidden_outweighs = rows > first->in_channels + second->out_channels;  // the weights of both layers
    return (hidden_outweighs ? pair_by_rows : pair_by_layers)(up, down, rows, threads);
}

}  // namespace pointwise
}  // namespace RK_ISA

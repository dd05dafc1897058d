// Pointwise convolutions row by row: each output is one sum in the order of the input channels, whatever the number of
// rows and threads and the tiling.
#pragma once

#include "pointwise_tile.h"

namespace RK_ISA {
namespace pointwise {

// Output channels that are computed for a tile of rows while it lies in the first level cache.
constexpr int64_t kGroup = RK_COLUMNS;
static RK_INLINE int64_t groups(const Product& p) { return ceil_div(p.columns, kGroup); }

// Activation and residual on the way from the block to the output: values_of(channel) is a function of the row and the sum, for
// a vector of channels.
template <class ValuesOf>
static RK_INLINE void finish(const Product& p, const float* block, Span rows, int64_t column, ValuesOf values_of) {
    const int64_t valid = smaller(kTileColumns, p.columns - column), stride = p.output_stride;
    const int activation = p.activation;
    for (int64_t c = 0; c < valid; c += kLanes) {
        const auto value = values_of(column + c);
        const int lanes = int(smaller(kLanes, valid - c));
        float* output = p.output + rows.begin * stride + column + c;
        const float* residual = p.residual ? p.residual + rows.begin * stride + column + c : nullptr;
        const float* sums = block + c;
        for (int64_t r = rows.begin; r < rows.end; r++, sums += kTileColumns, output += stride) {
            Vec v = activated(activation, value(r, load(sums)));
            if (residual) {
                v += lanes == kLanes ? load(residual) : load_some(residual, lanes);
                residual += stride;
            }
            if (lanes == kLanes)
                store(output, v);
            else
                store_some(output, v, lanes);
        }
    }
}

// Rows at a stride that maps them all to the same cache sets evict each other before they are used up.
static RK_INLINE bool rows_collide(const Product& p) {
    return p.depth > 512 && p.input_stride * sizeof(float) % 2048 == 0;
}

// Whether rows are copied before they are multiplied: also to multiply them by what their weights have been divided by.
static RK_INLINE bool copies_rows(const Product& p) { return rows_collide(p) || p.input_sizes; }

static void copy_row(const float* row, const Product& p, float* to) {
    if (!p.input_sizes)
        memcpy(to, row, p.depth * sizeof(float));
    else
        for (int64_t k = 0; k < p.depth; k++) to[k] = row[k] * p.input_sizes[k];
}

static RK_INLINE int64_t cached_rows(int64_t depth) {
    const int64_t tiles = kCachedFloats / (depth * kTileRows);
    return (tiles > 1 ? tiles : 1) * kTileRows;
}

// Weights that a thread will read after those it is reading.
struct Upcoming {
    const float* weights;
    int64_t lines;
};

static RK_INLINE Upcoming group_of(const Product& p, int64_t group) {
    return {p.packed + group * kGroup * p.depth, p.depth * kGroup / kLine};
}

// Some rows of a product, from `first` on, where they are read.
struct Rows {
    Pixels pixels;
    int64_t first, count;
};

// The product of some rows with one group of channels. `sums` holds sum_floats(depth).
static void compute_group(const Product& p, const Rows& rows, int64_t group, bool fetch_rows, Upcoming upcoming,
                          float* sums) {
    const int64_t first = group * kGroup, last = smaller(first + kGroup, p.columns);
    const int64_t strips = ceil_div(last - first, kTileColumns);
    const int64_t tiles = ceil_div(rows.count, kTileRows), blocks = depth_blocks(p.depth);
    alignas(64) static const float zeros[kTileColumns] = {};
    const auto values_of = [&](int64_t channel) {
        const bool divided = p.output_sizes;
        const Vec size = divided ? load(p.output_sizes + channel) : Vec{}, bias = divided ? load(p.bias + channel) : Vec{};
        return [=](int64_t, Vec sum) { return divided ? sum * size + bias : sum; };
    };
    for (int64_t b = 0; b < blocks; b++) {
        const Span depth = depth_block(p.depth, b);
        for (int64_t t = 0; t < tiles; t++) {
            const Span tile = part(rows.count, tiles, t);
            const Span written = {rows.first + tile.begin, rows.first + tile.end};
            const int64_t stride = rows.pixels.stride;
            const Pixels pixels = {rows.pixels.data + tile.begin * stride + depth.begin, stride};
            for (int64_t s = 0; s < strips; s++) {
                const int64_t column = first + s * kTileColumns;
                float* block = blocks > 1 ? sums + (t * kGroup + s * kTileColumns) * kTileRows : sums;
                const Start start = b ? Start{block, kTileColumns} : Start{p.output_sizes || !p.bias ? zeros : p.bias + column, 0};
                const bool fetch = fetch_rows && b == 0 && s == 0;
                fetch_share(upcoming.weights, upcoming.lines, (b * tiles + t) * strips + s, blocks * tiles * strips);
                if (b + 1 == blocks) fetch_output(p, written, column);
                multiply_rows(tile.size(), pixels, weights_at(p, depth.begin, column), depth.size(), start, block,
                              fetch ? rows.pixels.data + tile.end * stride : nullptr);
                if (b + 1 == blocks) finish(p, block, written, column, values_of);
            }
        }
    }
}

// Floats that one thread needs for `compute`: sums of a group, and rows copied apart.
static RK_INLINE int64_t sum_floats(int64_t depth) {
    return kGroup * (depth_blocks(depth) > 1 ? cached_rows(depth) : kTileRows);
}
static RK_INLINE int64_t own_floats(const Product& p) {
    return sum_floats(p.depth) + (copies_rows(p) ? cached_rows(p.depth) * padded(p.depth) : 0);
}

// The product of some rows with some groups, on the calling thread, before it goes on to `then`. `own` holds
// own_floats(p).
static void compute(const Product& p, Span rows, Span groups, Upcoming then, float* own) {
    const int64_t blocks = ceil_div(rows.size(), cached_rows(p.depth));
    for (int64_t b = 0; b < blocks; b++) {
        const Span span = part(rows.size(), blocks, b);
        const int64_t first = rows.begin + span.begin, count = span.size();
        Rows block{{p.input + first * p.input_stride, p.input_stride}, first, count};
        if (copies_rows(p)) {
            float* copy = own + sum_floats(p.depth);
            for (int64_t r = 0; r < count; r++) copy_row(block.pixels.data + r * p.input_stride, p, copy + r * padded(p.depth));
            block.pixels = {copy, padded(p.depth)};
        }
        for (int64_t group = groups.begin; group < groups.end; group++) {
            const bool last = group + 1 == groups.end, again = b + 1 < blocks;
            const Upcoming upcoming = last && !again ? then : group_of(p, last ? groups.begin : group + 1);
            const bool fetch_rows = p.from_memory && group == groups.begin && !copies_rows(p);
            compute_group(p, block, group, fetch_rows, upcoming, own);
        }
    }
}

// The whole product, called by every thread of a parallel region; ends with a barrier. The smaller of weight and
// pixels is what every thread reads in full. `next` is the product after it.
static void compute_shared(const Product& p, const Product& next, int64_t rows, int threads, float* own) {
    const int64_t all = groups(p), tiles = ceil_div(rows, kTileRows);
    const Upcoming then = group_of(next, smaller(omp_get_thread_num(), groups(next) - 1));
    if (p.columns > rows) {
        // Group by group, unless the rows are copied for each part.
        const int64_t parts = copies_rows(p) ? smaller(all, 2 * threads) : all;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < parts; i++) {
            const bool more = i + threads < parts;
            compute(p, {0, rows}, part(all, parts, i), more ? group_of(p, part(all, parts, i + threads).begin) : then,
                    own);
        }
    } else {
        const int64_t most = ceil_div(tiles * kTileRows, cached_rows(p.depth));
        const int64_t parts = smaller(tiles, most > 4 * threads ? most : 4 * threads);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < parts; i++) {
            const Span span = part(tiles, parts, i);
            compute(p, {span.begin * kTileRows, smaller(span.end * kTileRows, rows)}, {0, all}, group_of(p, 0), own);
        }
    }
}

// Each has the floats of workspace that it needs before it.
static int64_t one_by_rows_floats(const Product& p, const Product*, int64_t, int threads) {
    return own_floats(p) * threads;
}

static void one_by_rows(const Product& p, const Product*, int64_t rows, int threads, float* workspace) {
#pragma omp parallel num_threads(threads)
    compute_shared(p, p, rows, threads, workspace + omp_get_thread_num() * own_floats(p));
}

// Rows that a thread takes through both layers at once, and its floats: for `compute`, and the hidden channels.
struct PairBlock {
    int64_t rows, working, floats;
};
static PairBlock pair_block(const Product& first, const Product& second, int64_t rows, int threads) {
    const int64_t working = larger(own_floats(first), own_floats(from_workspace(second)));
    const int64_t share = ceil_div(ceil_div(rows, 4 * threads), kTileRows) * kTileRows;
    const int64_t block = smaller(cached_rows(second.depth), share);
    return {block, working, working + block * padded(second.depth)};
}

static int64_t pair_by_rows_floats(const Product& first, const Product* second, int64_t rows, int threads) {
    return pair_block(first, *second, rows, threads).floats * threads;
}

// Every thread takes some rows through both layers; their hidden channels never leave its cache.
static void pair_by_rows(const Product& first, const Product* last, int64_t rows, int threads, float* workspace) {
    const Product& second = *last;
    const PairBlock block = pair_block(first, second, rows, threads);
#pragma omp parallel num_threads(threads)
    {
        float* mine = workspace + omp_get_thread_num() * block.floats;
        Product up = first, down = from_workspace(second);
        down.input = up.output = mine + block.working;
        up.output_stride = down.input_stride;
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < rows; begin += block.rows) {
            const int64_t count = smaller(block.rows, rows - begin);
            up.input = first.input + begin * first.input_stride;
            down.output = second.output + begin * second.output_stride;
            if (second.residual) down.residual = second.residual + begin * second.output_stride;
            compute(up, {0, count}, {0, groups(first)}, group_of(down, 0), mine);
            compute(down, {0, count}, {0, groups(second)}, group_of(up, 0), mine);
        }
    }
}

static int64_t layer_floats(const Product& first, const Product& second) {
    return larger(own_floats(first), own_floats(from_workspace(second)));
}
static int64_t pair_by_layers_floats(const Product& first, const Product* second, int64_t rows, int threads) {
    return layer_floats(first, *second) * threads + rows * padded(second->depth);
}

// One layer after the other: each thread reads all rows and its part of the weights.
static void pair_by_layers(const Product& up, const Product* down, int64_t rows, int threads, float* workspace) {
    Product first = up, second = from_workspace(*down);
    const int64_t own = layer_floats(first, second);
    first.output = workspace + own * threads;
    second.input = first.output;
    first.output_stride = second.input_stride;
#pragma omp parallel num_threads(threads)
    {
        float* mine = workspace + omp_get_thread_num() * own;
        compute_shared(first, second, rows, threads, mine);
        compute_shared(second, first, rows, threads, mine);
    }
}

}  // namespace pointwise
}  // namespace RK_ISA

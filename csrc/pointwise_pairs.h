// Pointwise convolutions by pairs of channels, and how they are shared out among threads.
#pragma once

#include "channel_pairs.h"

namespace RK_ISA {
namespace pointwise {

constexpr int64_t kOwnFloats = 768 * 1024 / 4;  // of a thread's rows, in the second level cache
constexpr int64_t kFewestInPairs = 64;          // input channels of a layer that is faster by pairs of them
constexpr int64_t kEnoughRows = 2 * kPairRows;  // for a thread to read all weights by itself

// Whether it is faster, for maps of so many pixels. Nothing else decides, lest results depend on the batch.
static bool pairs_pay(const rk_layer& layer, int64_t pixels) {
    return pixels >= 40 && layer.pair_sums;
}

static size_t pair_sum_bytes(const rk_layer& layer) {
    if (layer.in_channels < kFewestInPairs) return 0;
    return ceil_div(layer.out_channels, kGroup) * kGroup * scaled_parts(layer.in_channels) * sizeof(float);
}

static void sum_layer_pairs(const rk_layer& layer, float* sums) {
    const int64_t depth = layer.in_channels;
    for (int64_t column = 0; column < layer.out_channels; column += kGroup)
        for (int64_t i = 0; i < scaled_parts(depth); i++, sums += kGroup) {
            const Span part = scaled_part(depth, i);
            sum_pairs({layer.weight + column * depth + part.begin * kPanel, depth * kPanel}, part.size(), sums);
        }
}

static bool pairs_by_rows_pay(int64_t rows, int threads) { return rows >= kEnoughRows * threads; }

static PairedRows paired_rows(const Product& p, int64_t rows, float* memory) {
    const PairedRows paired(memory, rows, p.depth);
    scale_rows(p.input, p.input_stride, p.depth, p.input_sizes, paired);
    return paired;
}

// The product of some rows with one group of channels. `totals` holds group_floats(rows).
static void multiply_parts(const Product& p, const PairedRows& pixels, Span rows, int64_t group, const NextWeights& then,
                           float* totals) {
    const int64_t parts = scaled_parts(p.depth);
    for (int64_t i = 0; i < parts; i++)
        multiply_group(p, {pixels, i, scaled_part(p.depth, i)}, rows, group,
                       i + 1 < parts ? weights_of(p, group, scaled_part(p.depth, i + 1)) : then,
                       totals);
}

static RK_INLINE NextWeights first_weights(const Product& p, int64_t group) {
    return weights_of(p, group, scaled_part(p.depth, 0));
}

static void multiply_groups(const Product& p, const PairedRows& pixels, const NextWeights& then, float* totals) {
    for (int64_t group = 0; group < groups(p); group++)
        multiply_parts(p, pixels, {0, pixels.count}, group, group + 1 < groups(p) ? first_weights(p, group + 1) : then, totals);
}

// The product with some output channels, from a multiple of kGroup on, written to `output`.
static Product columns_of(Product p, Span columns, float* output, int64_t stride) {
    p.packed += columns.begin * p.weight_depth;
    p.bias += columns.begin;
    p.output_sizes += columns.begin;
    p.pair_sums += columns.begin * scaled_parts(p.weight_depth);
    p.columns = columns.size();
    p.output = output;
    p.output_stride = stride;
    return p;
}

// Rows that a thread takes through all layers, how many times, and where its workspace holds what: totals of a group, pixels,
// and of a second layer a part of the hidden channels and the totals of all groups.
struct OwnRows {
    int64_t parts, pixels, hidden, totals, floats;
};
static OwnRows own_rows(const Product& first, const Product* second, int64_t rows, int threads) {
    const int64_t hidden = second ? smaller(second->depth, kScaled) : 0, all = second ? groups(*second) * kGroup : 0;
    const int64_t of_row = PairedRows::floats(1, first.depth) + PairedRows::floats(1, hidden) + all + kGroup;
    const int64_t most = larger(kOwnFloats / of_row, kEnoughRows);
    const int64_t parts = ceil_div(ceil_div(rows, most), threads) * threads, height = ceil_div(rows, parts);
    OwnRows own = {parts, group_floats(height), 0, 0, 0};
    own.hidden = own.pixels + PairedRows::floats(height, first.depth);
    own.totals = own.hidden + PairedRows::floats(height, hidden);
    own.floats = own.totals + (second ? groups(*second) * group_floats(height) : 0);
    return own;
}

static int64_t pairs_by_rows_floats(const Product& first, const Product* second, int64_t rows, int threads) {
    return own_rows(first, second, rows, threads).floats * threads;
}

// Both layers, a part of the hidden channels at a time: computed where they are scaled and used.
static void multiply_both(const Product& first, const Product& second, const PairedRows& pixels, const OwnRows& at,
                          float* own) {
    const int64_t rows = pixels.count, parts = scaled_parts(second.depth);
    for (int64_t i = 0; i < parts; i++) {
        const Span part = scaled_part(second.depth, i);
        const PairedRows hidden(own + at.hidden, rows, part.size());
        for (int64_t begin = part.begin; begin < part.end; begin += kDepth) {
            const Span columns = {begin, smaller(begin + kDepth, part.end)};
            const Product up = columns_of(first, columns, hidden.at((begin - part.begin) / kDepth, 0), PairedRows::kStride);
            multiply_groups(up, pixels,
                            columns.end < part.end ? first_weights(first, columns.end / kGroup) : weights_of(second, 0, part),
                            own);
        }
        for (int64_t r = 0; r < rows; r++)
            scale_row(hidden.at(0, r), rows * PairedRows::kStride, part.size(), second.input_sizes + part.begin, hidden, r);
        const int64_t after = i + 1 < parts ? part.end / kGroup : 0;
        for (int64_t group = 0; group < groups(second); group++)
            multiply_group(second, {hidden, 0, part}, {0, rows}, group,
                           group + 1 < groups(second) ? weights_of(second, group + 1, part) : first_weights(first, after),
                           own + at.totals + group * group_floats(rows));
    }
}

// Every thread takes some rows through all layers; what is between never leaves its cache.
static void pairs_by_rows(const Product& first, const Product* second, int64_t rows, int threads, float* workspace) {
    const OwnRows at = own_rows(first, second, rows, threads);
#pragma omp parallel num_threads(threads)
    {
        float* own = workspace + omp_get_thread_num() * at.floats;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < at.parts; i++) {
            const Span span = part(rows, at.parts, i);
            const Product up = from_row(first, span.begin);
            const PairedRows pixels = paired_rows(up, span.size(), own + at.pixels);
            if (second)
                multiply_both(up, from_row(*second, span.begin), pixels, at, own);
            else
                multiply_groups(up, pixels, first_weights(up, 0), own);
        }
    }
}

// One product, called by every thread of a parallel region; ends with a barrier. `then` is the product after it.
static void share_groups(const Product& p, int64_t rows, const Product& then, int threads, float* shared, float* own) {
    const PairedRows pixels(shared, rows, p.depth);
    const int64_t tiles = ceil_div(rows, kPairRows), parts = smaller(tiles, ceil_div(4 * threads, groups(p)));
#pragma omp for
    for (int64_t r = 0; r < rows; r++) scale_row(p.input + r * p.input_stride, kDepth, p.depth, p.input_sizes, pixels, r);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < groups(p) * parts; i++) {
        const int64_t next = (i + threads) / parts;
        multiply_parts(p, pixels, part(rows, parts, i % parts), i / parts,
                       next < groups(p) ? first_weights(p, next) : first_weights(then, 0), own);
    }
}

// What the threads share: the rows of either product, and the hidden channels if there is a second one; after the floats of
// each.
struct SharedRows {
    int64_t own, hidden, floats;
};
static SharedRows shared_rows(const Product& first, const Product* second, int64_t rows, int threads) {
    const int64_t own = group_floats(rows), depth = larger(first.depth, second ? second->depth : 0);
    const int64_t hidden = own * threads + PairedRows::floats(rows, depth);
    return {own, hidden, hidden + (second ? rows * padded(second->depth) : 0)};
}

static int64_t pairs_by_layers_floats(const Product& first, const Product* second, int64_t rows, int threads) {
    return shared_rows(first, second, rows, threads).floats;
}

// One layer after the other: every thread reads all rows and its part of the weights.
static void pairs_by_layers(const Product& first, const Product* second, int64_t rows, int threads, float* workspace) {
    const SharedRows at = shared_rows(first, second, rows, threads);
    float* const shared = workspace + at.own * threads;
#pragma omp parallel num_threads(threads)
    {
        float* own = workspace + omp_get_thread_num() * at.own;
        if (second) {
            Product up = first, down = from_workspace(*second);
            down.input = up.output = workspace + at.hidden;
            up.output_stride = down.input_stride;
            share_groups(up, rows, down, threads, shared, own);
            share_groups(down, rows, up, threads, shared, own);
        } else {
            share_groups(first, rows, first, threads, shared, own);
        }
    }
}

}  // namespace pointwise
}  // namespace RK_ISA

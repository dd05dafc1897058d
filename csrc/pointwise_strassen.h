// Large pointwise convolutions by Strassen's method, and how they are shared out among threads.
#pragma once

#include "strassen.h"

namespace RK_ISA {
namespace pointwise {

constexpr int64_t kOwnPairs = 56;     // of rows, whose operands a second level cache of 1 MiB holds
constexpr int64_t kEnoughPairs = 32;  // for a thread to form all right operands by itself

// Whether it is faster, for maps of so many pixels; measured. Nothing else decides, lest results depend on the batch.
static bool strassen_pays(const rk_layer& layer, int64_t pixels) {
    const bool fits = pixels % 2 == 0 && layer.in_channels % 32 == 0 && layer.out_channels % 64 == 0;
    return fits && pixels >= 96 && layer.in_channels * layer.out_channels >= 512 * 512;
}

// Whether every thread had better take some rows through all layers, alone: then none waits for what another has in
// its caches, which takes long where they share none.
static bool strassen_by_rows_pays(int64_t rows, int threads) { return rows / 2 >= kEnoughPairs * threads; }

// One product, or two of which the second reads what the first writes, for some pairs of rows, on the calling thread.
// The hidden channels are split, used and forgotten a block of channels of each half at a time; `sums` collects the
// products of the second layer.
struct OwnPairs {
    int64_t pairs;  // at most
    int64_t input, hidden, sums, floats;
};
static OwnPairs own_pairs(const Product& first, const Product* second, int64_t rows, int threads) {
    const int64_t most = ceil_div(rows / 2, ceil_div(ceil_div(rows / 2, kOwnPairs), threads) * threads);
    const int64_t input = pairs_floats(most), hidden = input + operand_floats(most, first.depth / 2);
    const int64_t sums = hidden + (second ? operand_floats(most, kDepth) : 0);
    return {most, input, hidden, sums, sums + (second ? strips(*second) * product_floats(most) : 0)};
}

static void own_product(const Product& p, const Operands& left, Span pairs, float* own) {
    const int64_t end = p.columns / 2;
    for (int64_t column = 0; column < end; column += kTileColumns) {
        const int64_t next = column + kTileColumns;
        compute_pairs(p, left, pairs, column, block_at(p, 0, next < end ? next : 0), own, nullptr);
    }
}

static void own_pair_of_products(const Product& first, const Product& second, const Operands& left, Span pairs,
                                 const OwnPairs& at, float* own) {
    const int64_t blocks = half_blocks(second), floats = product_floats(pairs.size());
    float* sums = own + at.sums;
    for (int64_t b = 0; b < blocks; b++) {
        const Span channels = half_block(second, b);
        const Operands hidden = operands(own + at.hidden, pairs.size(), channels);
        for (int64_t column = channels.begin; column < channels.end; column += kTileColumns) {
            const int64_t next = column + kTileColumns;
            compute_pairs(first, left, pairs, column,
                          next < channels.end ? block_at(first, 0, next) : block_at(second, b, 0), own, &hidden);
        }
        for (int64_t s = 0; s < strips(second); s++) {
            const int64_t next = s + 1 < strips(second) ? (s + 1) * kTileColumns : 0;
            const Block then = next ? block_at(second, b, next) : block_at(first, 0, b + 1 < blocks ? channels.end : 0);
            multiply_block(hidden, pairs, block_at(second, b, s * kTileColumns), b > 0, then, own, sums + s * floats);
        }
    }
    for (int64_t s = 0; s < strips(second); s++) join(second, pairs, s * kTileColumns, sums + s * floats, nullptr);
}

static int64_t strassen_by_rows_floats(const Product& first, const Product* second, int64_t rows, int threads) {
    return own_pairs(first, second, rows, threads).floats * threads;
}

// Every thread takes some pairs of rows through all layers; their operands never leave its cache.
static void strassen_by_rows(const Product& first, const Product* second, int64_t rows, int threads, float* workspace) {
    const OwnPairs at = own_pairs(first, second, rows, threads);
    const int64_t parts = ceil_div(rows / 2, at.pairs);
#pragma omp parallel num_threads(threads)
    {
        float* own = workspace + omp_get_thread_num() * at.floats;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < parts; i++) {
            const Span span = part(rows / 2, parts, i), pairs = {0, span.size()};
            const Product up = from_row(first, 2 * span.begin);
            const Operands left = operands(own + at.input, pairs.size(), {0, first.depth / 2});
            for (int64_t pair = 0; pair < pairs.size(); pair++) split_pair(up.input, up.depth, left, pair);
            if (second)
                own_pair_of_products(up, from_row(*second, 2 * span.begin), left, pairs, at, own);
            else
                own_product(up, left, pairs, own);
        }
    }
}

// One product, called by every thread of a parallel region; ends with a barrier. `then` is the product after it.
static void share_product(const Product& p, const Operands& left, const Product& then, int threads, float* own,
                          const Operands* next = nullptr) {
    const int64_t tiles = ceil_div(left.pairs, kTileRows), parts = smaller(tiles, ceil_div(4 * threads, strips(p)));
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < strips(p) * parts; i++) {
        const int64_t upcoming = (i + threads) / parts;
        const Block block = upcoming < strips(p) ? block_at(p, 0, upcoming * kTileColumns) : block_at(then, 0, 0);
        compute_pairs(p, left, part(left.pairs, parts, i % parts), i / parts * kTileColumns, block, own, next);
    }
}

// What the threads share: the operands of the first product and of the second, if there is one; after the floats of each.
struct SharedPairs {
    int64_t own, input, hidden, floats;
};
static SharedPairs shared_pairs(const Product& first, const Product* second, int64_t rows, int threads) {
    const int64_t own = pairs_floats(rows / 2), input = own * threads;
    const int64_t hidden = input + operand_floats(rows / 2, first.depth / 2);
    return {own, input, hidden, hidden + (second ? operand_floats(rows / 2, second->depth / 2) : 0)};
}

static int64_t strassen_by_layers_floats(const Product& first, const Product* second, int64_t rows, int threads) {
    return shared_pairs(first, second, rows, threads).floats;
}

// One layer after the other: every thread reads all rows and its part of the weights.
static void strassen_by_layers(const Product& first, const Product* second, int64_t rows, int threads, float* workspace) {
    const SharedPairs at = shared_pairs(first, second, rows, threads);
    const Operands left = operands(workspace + at.input, rows / 2, {0, first.depth / 2});
#pragma omp parallel num_threads(threads)
    {
        float* own = workspace + omp_get_thread_num() * at.own;
#pragma omp for
        for (int64_t pair = 0; pair < left.pairs; pair++) split_pair(first.input, first.depth, left, pair);
        if (second) {
            const Operands hidden = operands(workspace + at.hidden, rows / 2, {0, second->depth / 2});
            share_product(first, left, *second, threads, own, &hidden);
            share_product(*second, hidden, first, threads, own);
        } else {
            share_product(first, left, first, threads, own);
        }
    }
}

}  // namespace pointwise
}  // namespace RK_ISA

// Pointwise convolutions by Winograd's inner products (A New Algorithm for Inner Product, 1968), for processors that add
// beside their multiply-adds, in units of their own: one multiply-add and two additions make two products,
//
//     (w1 + x0) (w0 + x1) = x0 w0 + x1 w1 + x0 x1 + w0 w1.
//
// Of each block of channels two thirds are multiplied in such pairs and one third one by one, which keeps both kinds of
// units busy: three products for two multiply-adds and two additions. What pairs add of pixels alone and of weights alone
// is subtracted in the end. Every second pair is (w1 - x0) (w0 - x1), subtracted, lest it grows.
//
// Rounding errors are relative to the larger of the two kinds of factors. So weights come divided by the sizes of their input
// channel, which the pixels are multiplied by, and of their output channel, and kScaled channels of a row of pixels at a time
// are divided by theirs; all of them powers of two. Sums of so many channels are added up in order, whatever the
// number of rows and threads.
#pragma once

#include <math.h>

#include "pointwise_rows.h"

namespace RK_ISA {
namespace pointwise {

constexpr int64_t kPairRows = kVectors == 2 ? kTileRows - 1 : kTileRows;

constexpr int64_t kScaled = 4 * kDepth;
constexpr int64_t kRowsAhead = 2;  // that are fetched before they are scaled
static RK_INLINE int64_t scaled_parts(int64_t depth) { return ceil_div(depth, kScaled); }
static RK_INLINE Span scaled_part(int64_t depth, int64_t i) { return {i * kScaled, smaller((i + 1) * kScaled, depth)}; }

// How a block of channels is taken: `paired` of them, a multiple of four, first, and half as many beside them.
static RK_INLINE int64_t paired_channels(int64_t depth) { return depth / 6 * 4; }

// Each lane from the one whose number differs in the bit kApart.
template <int kApart, int... I>
static RK_INLINE Vec swapped(Vec v, Indices<I...>) {
    return __builtin_shufflevector(v, v, (I ^ kApart)...);
}

// All lanes together.
template <int kApart = kLanes / 2, class Join>
static RK_INLINE float joined(Vec v, Join join) {
    if constexpr (kApart == 0)
        return v[0];
    else
        return joined<kApart / 2>(join(v, swapped<kApart>(v, Lanes{})), join);
}
static RK_INLINE float total(Vec v) {
    return joined(v, [](Vec a, Vec b) { return a + b; });
}
static RK_INLINE float largest_of(Vec v) {
    return joined(v, [](Vec a, Vec b) { return a > b ? a : b; });
}

// The products of neighbours, of pairs that are subtracted with the opposite sign.
static RK_INLINE Vec add_pairs(Vec sum, Vec v) {
    Vec half;
    for (int lane = 0; lane < kLanes; lane++) half[lane] = lane & 2 ? -0.5f : 0.5f;
    return sum + v * half * swapped<1>(v, Lanes{});
}

// The power of two next to `x`, as far as it and its inverse are normal numbers.
static RK_INLINE float power_of_two(float x) {
    if (!(x > 0x1p-126f)) return 0x1p-126f;  // NaN too
    if (x >= 0x1p126f) return 0x1p126f;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + (1u << 22)) & ~((1u << 23) - 1);
    memcpy(&x, &bits, sizeof x);
    return x;
}

// use(place, vector) for all of a row, with zeros behind its end.
template <class Use>
static RK_INLINE void for_each_vector(const float* row, int64_t size, Use use) {
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) use(k, load(row + k));
    if (k < size) use(k, load_some(row + k, int(size - k)));
}

// Rows of a product, scaled; block by block of kDepth channels.
struct PairedRows {
    static constexpr int64_t kStride = kDepth + kLine;
    int64_t count;
    float *scales, *pair_sums, *data;  // of each scaled part of a row, what restores its size and what its pairs add

    static int64_t floats(int64_t rows, int64_t depth) {
        return rows * (ceil_div(depth, kDepth) * kStride + 2 * scaled_parts(depth));
    }
    PairedRows(float* memory, int64_t rows, int64_t depth)
        : count(rows),
          scales(memory),
          pair_sums(memory + scaled_parts(depth) * rows),
          data(memory + 2 * scaled_parts(depth) * rows) {}
    float* at(int64_t block, int64_t row) const { return data + (block * count + row) * kStride; }
};

static RK_INLINE void add_size(Vec v, Vec& squares, Vec& largest) {
    const Vec size = v < Vec{} ? -v : v;
    squares += v * v;
    largest = size > largest ? size : largest;
}

// The root of the mean square of `count` numbers with the sum `squares`, or the largest of them where squares leave the range
// of floats.
static RK_INLINE float size_of(float squares, float largest, int64_t count) {
    const float mean = squares / float(count);
    return mean > 1e-30f && mean < 1e30f ? sqrtf(mean) : largest;
}

// Fills in a row, of whose pixels each block of channels is `apart` from the one before; they may be where they belong.
// `sizes`, of the channels' weights, may be null.
static void scale_row(const float* pixels, int64_t apart, int64_t depth, const float* sizes, const PairedRows& rows,
                      int64_t row) {
    for (int64_t i = 0; i < scaled_parts(depth); i++) {
        const Span part = scaled_part(depth, i);
        const auto each_vector = [&](auto use) {
            for (int64_t k = part.begin; k < part.end; k += kDepth)
                for_each_vector(pixels + k / kDepth * apart, smaller(kDepth, part.end - k), [&](int64_t c, Vec v) {
                    if (sizes) v *= load_some(sizes + k + c, int(smaller(kLanes, part.end - k - c)));
                    use(rows.at(k / kDepth, row) + c, v);
                });
        };
        Vec squares = {}, largest = {}, pairs = {};
        each_vector([&](float*, Vec v) { add_size(v, squares, largest); });
        const float scale = power_of_two(1 / size_of(total(squares), largest_of(largest), part.size()));
        each_vector([&](float* to, Vec v) { store(to, v * scale); });
        for (int64_t k = part.begin; k < part.end; k += kDepth)
            for_each_vector(rows.at(k / kDepth, row), paired_channels(smaller(kDepth, part.end - k)),
                            [&](int64_t, Vec v) { pairs = add_pairs(pairs, v); });
        rows.scales[i * rows.count + row] = 1 / scale;
        rows.pair_sums[i * rows.count + row] = total(pairs);
    }
}

// Fills in all rows from some that are `stride` apart.
static void scale_rows(const float* pixels, int64_t stride, int64_t depth, const float* sizes, const PairedRows& rows) {
    for (int64_t r = 0; r < rows.count; r++, pixels += stride) {
        if (r + kRowsAhead < rows.count)
            for (int64_t k = 0; k < depth; k += kLine) __builtin_prefetch(pixels + kRowsAhead * stride + k);
        scale_row(pixels, kDepth, depth, sizes, rows, r);
    }
}

// What the pairs of a scaled part of the input channels add of the weights of a group alone; kGroup sums.
static void sum_pairs(Weights weights, int64_t depth, float* sums) {
    for (int64_t c = 0; c < kGroup; c += kLanes) {
        Vec sum = {};
        for (int64_t begin = 0; begin < depth; begin += kDepth) {
            const float* w = weights.data + c / kPanel * weights.apart + c % kPanel + begin * kPanel;
            const int64_t paired = paired_channels(smaller(kDepth, depth - begin));
            for (int64_t k = 0; k < paired; k += 4, w += 4 * kPanel)
                sum += load(w) * load(w + kPanel) - load(w + 2 * kPanel) * load(w + 3 * kPanel);
        }
        store(sums + c, sum);
    }
}

// Where they are, of the input channels from `channel` on.
static RK_INLINE const float* pair_sums_at(const Product& p, int64_t channel, int64_t group) {
    return p.pair_sums + (group * scaled_parts(p.weight_depth) + channel / kScaled) * kGroup;
}

// Weights that a thread will read next, of some input channels by a group of output channels.
struct NextWeights {
    Weights weights;
    int64_t channels;

    NextWeights some(Span span) const { return {{weights.data + span.begin * kPanel, weights.apart}, span.size()}; }
    RK_INLINE void fetch(int64_t channel) const {
        for (int64_t panel = 0; panel < kGroup / kPanel; panel++)
            __builtin_prefetch(weights.data + channel * kPanel + panel * weights.apart, 0, 2);
    }
};
static RK_INLINE NextWeights weights_of(const Product& p, int64_t group, Span channels) {
    return {weights_at(p, channels.begin, group * kGroup), channels.size()};
}

// One pointer for each vector of a tile: a pixel that is loaded for each of them is broadcast by its addition or
// multiply-add; the compiler would load it once, by an instruction that takes a turn of their units.
struct Pointers {
    const float* at[kVectors];
    explicit Pointers(const float* data) {
        for (int v = 0; v < kVectors; v++) {
            at[v] = data;
            asm("" : "+r"(at[v]));
        }
    }
    RK_INLINE void advance(int64_t floats) {
        for (int v = 0; v < kVectors; v++) at[v] += floats;
    }
};

static RK_INLINE void load_weights(const float* weights, int64_t apart, Vec weight[kVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) weight[v] = load(weights + v * kLanes % kPanel + v * kLanes / kPanel * apart);
}

// sum[kRows][kVectors] += two input channels, or what their pair subtracted comes to
template <int kRows, bool kSubtracted>
static RK_INLINE void add_pair(Vec (*sum)[kVectors], const Pointers& x, const float* weights, int64_t apart) {
    Vec w0[kVectors], w1[kVectors];
    load_weights(weights, apart, w0);
    load_weights(weights + kPanel, apart, w1);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
            const Vec x0 = broadcast(x.at[v][row * PairedRows::kStride]);
            const Vec x1 = broadcast(x.at[v][row * PairedRows::kStride + 1]);
            if (kSubtracted)
                sum[row][v] -= (w1[v] - x0) * (w0[v] - x1);
            else
                sum[row][v] += (w1[v] + x0) * (w0[v] + x1);
        }
}

template <int kRows>
static RK_INLINE void add_single(Vec (*sum)[kVectors], const Pointers& x, const float* weights, int64_t apart) {
    Vec w[kVectors];
    load_weights(weights, apart, w);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sum[row][v] += broadcast(x.at[v][row * PairedRows::kStride]) * w[v];
}

// sum[kRows][kVectors] += a block of at most kDepth input channels. Meanwhile brings `next` into the second level cache.
template <int kRows>
static RK_INLINE void add_block(Vec (*sum)[kVectors], const float* pixels, Weights weights, int64_t depth,
                                const NextWeights& next) {
    const int64_t paired = paired_channels(depth), apart = weights.apart;
    const int64_t fetched_a_step = paired ? ceil_div(next.channels, paired / 4) : 0;
    const float *w = weights.data, *single_w = w + paired * kPanel;
    Pointers x(pixels), single_x(pixels + paired);
    for (int64_t k = 0, fetched = 0; k < paired; k += 4, w += 4 * kPanel, single_w += 2 * kPanel) {
        const int64_t until = smaller(fetched + fetched_a_step, next.channels);
        for (; fetched < until; fetched++) next.fetch(fetched);
        add_pair<kRows, false>(sum, x, w, apart);
        add_single<kRows>(sum, single_x, single_w, apart);
        x.advance(2), single_x.advance(1);
        add_pair<kRows, true>(sum, x, w + 2 * kPanel, apart);
        add_single<kRows>(sum, single_x, single_w + kPanel, apart);
        x.advance(2), single_x.advance(1);
    }
    for (int64_t k = paired / 2 * 3; k < depth; k++, single_w += kPanel, single_x.advance(1))
        add_single<kRows>(sum, single_x, single_w, apart);
}

// sums[kRows][kTileColumns] = pixels @ weights, over `depth` input channels, whose blocks of pixels are `apart`. Meanwhile
// brings `next` into the second level cache.
template <int kRows>
static void multiply_in_pairs(const float* pixels, int64_t apart, Weights weights, int64_t depth, const NextWeights& next,
                              float* sums) {
    const int64_t blocks = ceil_div(depth, kDepth);
    Vec sum[kRows][kVectors] = {};
    for (int64_t b = 0; b < blocks; b++)
        add_block<kRows>(sum, pixels + b * apart, {weights.data + b * kDepth * kPanel, weights.apart},
                         smaller(kDepth, depth - b * kDepth), next.some(part(next.channels, blocks, b)));
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) store(sums + row * kTileColumns + v * kLanes, sum[row][v]);
}

template <int kRows = kPairRows>
static RK_INLINE void multiply_rows_in_pairs(int64_t rows, const float* pixels, int64_t apart, Weights weights, int64_t depth,
                                             const NextWeights& next, float* sums) {
    if (rows == kRows)
        multiply_in_pairs<kRows>(pixels, apart, weights, depth, next, sums);
    else if constexpr (kRows > 1)
        multiply_rows_in_pairs<kRows - 1>(rows, pixels, apart, weights, depth, next, sums);
}

// Floats of a group's results, in blocks of kPairRows rows by kTileColumns channels.
static RK_INLINE int64_t group_floats(int64_t rows) { return kGroup * ceil_div(rows, kPairRows) * kPairRows; }

// Where the input channels of a product are, that are scaled together.
struct ScaledPart {
    PairedRows rows;
    int64_t index;  // within `rows`
    Span channels;  // within the product
    bool is_last(const Product& p) const { return channels.end == p.depth; }
    const float* at(int64_t row) const { return rows.at(index * (kScaled / kDepth), row); }
    Vec restored(int64_t row, Vec sum) const {
        return (sum - rows.pair_sums[index * rows.count + row]) * rows.scales[index * rows.count + row];
    }
};

// Adds what a part of the input channels makes for some rows and a group of channels to `totals`, or finishes the product with
// the last part, before the thread goes on to `next`. `totals` holds group_floats(rows); of a single part it may be null.
static void multiply_group(const Product& p, const ScaledPart& pixels, Span rows, int64_t group, const NextWeights& next,
                           float* totals) {
    alignas(64) float sums[kPairRows * kTileColumns];
    const Span channels = pixels.channels;
    const int64_t first = group * kGroup, last = smaller(first + kGroup, p.columns);
    const int64_t strips = ceil_div(last - first, kTileColumns), tiles = ceil_div(rows.size(), kPairRows);
    const float* const pair_sums = pair_sums_at(p, channels.begin, group);
    for (int64_t t = 0; t < tiles; t++) {
        const Span part_of_rows = part(rows.size(), tiles, t);
        const Span tile = {rows.begin + part_of_rows.begin, rows.begin + part_of_rows.end};
        for (int64_t s = 0; s < strips; s++) {
            const int64_t column = first + s * kTileColumns;
            const int64_t at = (t * kGroup + s * kTileColumns) * kPairRows;  // of the tile's totals
            const float* const before = channels.begin ? totals + at : nullptr;
            if (pixels.is_last(p)) fetch_output(p, tile, column);
            multiply_rows_in_pairs(tile.size(), pixels.at(tile.begin), pixels.rows.count * PairedRows::kStride,
                                   weights_at(p, channels.begin, column), channels.size(),
                                   next.some(part(next.channels, tiles * strips, t * strips + s)), sums);
            const auto product_of = [&](int64_t c, Vec bias) {
                const Vec of_weights = load(pair_sums + c - first), size = p.output_sizes ? load(p.output_sizes + c) : broadcast(1);
                const float* const total = before ? before + c - column - tile.begin * kTileColumns : nullptr;
                return [=](int64_t row, Vec sum) __attribute__((always_inline)) {
                    const Vec v = pixels.restored(row, sum - of_weights) * size + bias;
                    return total ? v + load(total + row * kTileColumns) : v;
                };
            };
            if (pixels.is_last(p)) {
                finish(p, sums, tile, column, [&](int64_t c) { return product_of(c, p.bias ? load(p.bias + c) : Vec{}); });
                continue;
            }
            for (int64_t c = 0; c < kTileColumns; c += kLanes) {
                const auto product = product_of(column + c, Vec{});
                for (int64_t row = tile.begin, i = c; row < tile.end; row++, i += kTileColumns)
                    store(totals + at + i, product(row, load(sums + i)));
            }
        }
    }
}

}  // namespace pointwise
}  // namespace RK_ISA

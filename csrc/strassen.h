// Strassen's method in Winograd's form: the product of two matrices of 2 x 2 blocks as 7 products of blocks and 15 sums,
// for the 8 products of the definition.
//
// The blocks of the pixels are even and odd rows by the two halves of the input channels, those of the weight the halves
// of its input by the halves of its output channels. So a pair of rows determines its own results, whatever the number
// of rows and threads. See Douglas et al., GEMMW (1994), whose names of the sums these are.
#pragma once

#include "pointwise_tile.h"

namespace RK_ISA {
namespace pointwise {

constexpr int kProducts = 7;
constexpr int64_t kSplitAhead = 2;  // pairs that `split_pair` fetches before it needs them
constexpr int64_t kJoinAhead = 4;   // and `join`; rows a power of two apart leave no room for more

// The left operands of the products: seven matrices of (pairs of rows, some of the channels of a half).
struct Operands {
    float* data;
    int64_t pairs, stride;
    int64_t first_channel;
    float* at(int product, int64_t pair, int64_t channel) const {
        return data + ((product * pairs + pair) * stride + channel - first_channel);
    }
};
static RK_INLINE Operands operands(float* data, int64_t pairs, Span channels) {
    return {data, pairs, padded(channels.size()), channels.begin};
}
static RK_INLINE int64_t operand_floats(int64_t pairs, int64_t channels) { return kProducts * pairs * padded(channels); }

static RK_INLINE void store_operands(const Operands& left, int64_t pair, int64_t channel, const Vec a[2][2]) {
    const Vec s1 = a[1][0] + a[1][1], s2 = s1 - a[0][0], s3 = a[0][0] - a[1][0], s4 = a[0][1] - s2;
    const Vec sums[kProducts] = {a[0][0], a[0][1], s4, a[1][1], s1, s2, s3};
    for (int i = 0; i < kProducts; i++) store(left.at(i, pair, channel), sums[i]);
}

// The left operands of a pair of rows of `input`.
static void split_pair(const float* input, int64_t channels, const Operands& left, int64_t pair) {
    const int64_t half = channels / 2;
    const float *even = input + 2 * pair * channels, *odd = even + channels;
    for (int64_t c = 0; c < half; c += kLanes) {
        const float* ahead = even + 2 * kSplitAhead * channels + 4 * c;
        for (int64_t i = 0; i < 4 * kLanes; i += kLine) __builtin_prefetch(ahead + i);
        const Vec a[2][2] = {{load(even + c), load(even + half + c)}, {load(odd + c), load(odd + half + c)}};
        store_operands(left, pair, c, a);
    }
}

// Some input channels of the upper half and the same of the lower, by kTileColumns output channels from `column` on and
// the same of the right half.
struct Block {
    const Product* p;
    Span depth;
    int64_t column;
    Weights at(int lower, int right) const {
        return weights_at(*p, depth.begin + lower * p->depth / 2, column + right * p->columns / 2);
    }
};

// Blocks of the channels of a half, of at most kDepth; they begin where a tile does.
static RK_INLINE int64_t half_blocks(const Product& p) { return depth_blocks(p.depth / 2); }
static RK_INLINE Span half_block(const Product& p, int64_t index) {
    const Span tiles = part(ceil_div(p.depth / 2, kTileColumns), half_blocks(p), index);
    return {tiles.begin * kTileColumns, smaller(tiles.end * kTileColumns, p.depth / 2)};
}
static RK_INLINE Block block_at(const Product& p, int64_t index, int64_t column) {
    return {&p, half_block(p, index), column};
}

constexpr int64_t kFormedFloats = kDepth * kTileColumns;

// result = left - right, of the weights of kTileColumns channels by `depth` input channels. The result may be one of
// the two.
static void subtract(const Weights& left, const Weights& right, int64_t depth, float* result) {
    const int64_t floats = depth * kPanel;
    for (int64_t panel = 0; panel < kTileColumns / kPanel; panel++) {
        const float *from = left.data + panel * left.apart, *less = right.data + panel * right.apart;
        float* to = result + panel * floats;
        for (int64_t i = 0; i < floats; i += kLanes) store(to + i, load(from + i) - load(less + i));
    }
}

// The order in which the products are computed.
constexpr int kOrder[kProducts] = {0, 1, 2, 4, 5, 3, 6};

// The right operand of a product: three are parts of the block where they are. Four are formed in `formed`, two of them
// from the one that was formed before.
static Weights right_operand(const Block& block, int product, float* formed) {
    const int64_t depth = block.depth.size();
    const Weights b11 = block.at(0, 0), b12 = block.at(0, 1), b21 = block.at(1, 0), b22 = block.at(1, 1);
    const Weights kept = {formed, depth * kPanel};
    switch (product) {
        case 0: return b11;
        case 1: return b21;
        case 2: return b22;
        case 4: subtract(b12, b11, depth, formed); break;   // t1
        case 5: subtract(b22, kept, depth, formed); break;  // t2 = b22 - t1
        case 3: subtract(kept, b21, depth, formed); break;  // t4 = t2 - b21
        default: subtract(b22, b12, depth, formed);         // t3
    }
    return kept;
}

// products = left @ right over `depth` channels, or that much more. Meanwhile brings some weights, of as many input
// channels, into the second level cache.
static void multiply_pairs(Pixels left, int64_t pairs, Weights right, int64_t depth, bool add, float* products,
                           const Weights* upcoming, int64_t upcoming_depth) {
    alignas(64) static const float zeros[kTileColumns] = {};
    const int64_t tiles = ceil_div(pairs, kTileRows), lines = upcoming ? ceil_div(upcoming_depth, tiles) : 0;
    const float* line = upcoming ? upcoming->data : nullptr;
    for (int64_t t = 0; t < tiles; t++) {
        for (int64_t l = 0; l < lines; l++, line += kLine)
            for (int panel = 0; panel < kTileColumns / kPanel; panel++)
                __builtin_prefetch(line + panel * upcoming->apart, 0, 2);
        const int64_t height = pairs / tiles + (t < pairs % tiles);
        const float* const next = left.data + height * left.stride;
        multiply_rows(height, left, right, depth, add ? Start{products, kTileColumns} : Start{zeros, 0}, products, next);
        left.data = next;
        products += height * kTileColumns;
    }
}

static RK_INLINE int64_t product_floats(int64_t pairs) { return kProducts * pairs * kTileColumns; }

// The seven products of some pairs of rows with a block, or that much more, before the calling thread goes on to
// `then`. `formed` holds kFormedFloats.
static void multiply_block(const Operands& left, Span pairs, const Block& block, bool add, const Block& then,
                           float* formed, float* products) {
    for (int i = 0; i < kProducts; i++) {
        const int product = kOrder[i], quarter = i - (kProducts - 4);  // of `then`, fetched during the last four
        const Weights fetched = quarter < 0 ? Weights{} : then.at(quarter / 2, quarter % 2);
        const Pixels pixels = {left.at(product, pairs.begin, block.depth.begin), left.stride};
        multiply_pairs(pixels, pairs.size(), right_operand(block, product, formed), block.depth.size(), add,
                       products + product * pairs.size() * kTileColumns, quarter < 0 ? nullptr : &fetched,
                       then.depth.size());
    }
}

// Brings what `join` will write for a pair, and the residual, into the first level cache.
static RK_INLINE void fetch_pair(const Product& p, int64_t pair, int64_t column, const Operands* next) {
    if (next) {
        for (int i = 0; i < kProducts; i++)
            for (int64_t c = 0; c < kTileColumns; c += kLine) __builtin_prefetch(next->at(i, pair, column + c), 1);
    } else {
        const Span rows = {2 * pair, 2 * pair + 2};
        for (int right = 0; right < 2; right++) fetch_output(p, rows, column + right * p.columns / 2);
    }
}

// From the products of some pairs of rows to their results: outputs, or left operands of the next layer.
static void join(const Product& p, Span pairs, int64_t column, const float* products, const Operands* next) {
    const int64_t half = p.columns / 2, stride = pairs.size() * kTileColumns;
    for (int64_t pair = pairs.begin - kJoinAhead; pair < pairs.end; pair++) {
        if (pair + kJoinAhead < pairs.end) fetch_pair(p, pair + kJoinAhead, column, next);
        if (pair < pairs.begin) continue;
        for (int64_t v = 0; v < kTileColumns; v += kLanes, products += kLanes) {
            Vec m[kProducts];
            for (int i = 0; i < kProducts; i++) m[i] = load(products + i * stride);
            const Vec u2 = m[0] + m[5], u3 = u2 + m[6];
            Vec c[2][2] = {{m[0] + m[1], u2 + m[4] + m[2]}, {u3 - m[3], u3 + m[4]}};
            for (int row = 0; row < 2; row++)
                for (int right = 0; right < 2; right++) {
                    const int64_t channel = column + v + right * half;
                    Vec& value = c[row][right];
                    value = activated(p.activation, value + load(p.bias + channel));
                    if (next) continue;
                    const int64_t at = (2 * pair + row) * p.output_stride + channel;
                    store(p.output + at, p.residual ? value + load(p.residual + at) : value);
                }
            if (next) store_operands(*next, pair, column + v, c);
        }
    }
}

// Floats that one thread needs for `compute_pairs`: a formed right operand, and the seven products.
static RK_INLINE int64_t pairs_floats(int64_t pairs) { return kFormedFloats + product_floats(pairs); }

// The results of some pairs of rows for kTileColumns channels of each half, before the calling thread goes on to
// `then`. `own` holds pairs_floats(pairs).
static void compute_pairs(const Product& p, const Operands& left, Span pairs, int64_t column, const Block& then,
                          float* own, const Operands* next) {
    float* products = own + kFormedFloats;
    const int64_t blocks = half_blocks(p);
    for (int64_t b = 0; b < blocks; b++)
        multiply_block(left, pairs, block_at(p, b, column), b > 0, b + 1 < blocks ? block_at(p, b + 1, column) : then, own,
                       products);
    join(p, pairs, column, products, next);
}

// Strips of kTileColumns channels of each half.
static RK_INLINE int64_t strips(const Product& p) { return p.columns / 2 / kTileColumns; }

}  // namespace pointwise
}  // namespace RK_ISA

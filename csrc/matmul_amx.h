// Products of float32 matrices by AMX, for training, whose weights change with each step: see bf16_parts.h.
//
// Both matrices are split into parts, kChunk channels of the depth at a time. Each element is a sum in the order of the
// depth, whatever the number of threads.
#pragma once

#include "amx_chores.h"
#include "matrix.h"

namespace RK_ISA {
namespace matmul {

using namespace pointwise;

constexpr int64_t kChunk = 512;     // of the depth
constexpr int64_t kMostTiles = 26;  // of rows that a thread takes on: their parts stay in the second level cache

// The parts of some rows of the left matrix (rows, depth), a chunk of the depth.
static void split_left(const rk_matrix& m, Span rows, Span depth, const Left& left) {
    const int64_t tiles = tiles_of(rows.size());
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = rows.begin + tile * left.height, height = smaller(left.height, rows.end - first);
        for (int64_t s = 0; s < left.steps; s++) {
            uint16_t* const to = left.at(tile, s);
            const int64_t lower = depth.begin + s * tiles::kDepth, upper = lower + tiles::kRows;
            if (!m.transposed) {
                for (int64_t r = 0; r < height; r++)
                    tiles::split_row(m.data + (first + r) * m.stride + depth.begin, depth.size(), s, to + r * tiles::kDepth);
                continue;
            }
            Vec low[16], high[16];
            load_transposed(m.data + lower * m.stride + first, m.stride, limited(depth.end - lower), height, low);
            load_transposed(m.data + upper * m.stride + first, m.stride, limited(depth.end - upper), height, high);
            for (int64_t r = 0; r < height; r++) tiles::store_parts(to + r * tiles::kDepth, low[r], high[r]);
        }
    }
}

// The parts of a strip of the right matrix (depth, columns), a chunk of the depth: for each step, for each part, two tiles.
static void split_right(const rk_matrix& m, int64_t columns, int64_t strip, Span depth, uint16_t* to) {
    const int64_t steps = tiles::steps_of(depth.size());
    for (int64_t s = 0; s < steps; s++, to += kStripStep)
        for (int64_t panel = 0; panel < 2; panel++) {
            const int64_t lower = depth.begin + s * tiles::kDepth, upper = lower + tiles::kRows;
            const int64_t column = strip * kStrip + panel * kPanel, width = limited(columns - column);
            Vec low[16], high[16];
            if (m.transposed) {
                load_transposed(m.data + column * m.stride + lower, m.stride, width, limited(depth.end - lower), low);
                load_transposed(m.data + column * m.stride + upper, m.stride, width, limited(depth.end - upper), high);
            }
            for (int64_t r = 0; r < tiles::kRows; r++) {
                if (!m.transposed) {
                    const auto row = [&](int64_t k) {
                        return k < depth.end && width ? load_some(m.data + k * m.stride + column, int(width)) : Vec{};
                    };
                    low[r] = row(lower + r), high[r] = row(upper + r);
                }
                UVec parts[tiles::kParts];
                tiles::split(low[r], high[r], parts);
                for (int i = 0; i < tiles::kParts; i++)
                    memcpy(to + (2 * i + panel) * tiles::kSize + r * tiles::kDepth, &parts[i], sizeof parts[i]);
            }
        }
}

// Product of some rows, whose parts are `left`, with all strips, whose parts are `right`.
static void multiply_strips(const Product& p, const Left& left, int64_t count, const uint16_t* right, float* blocks) {
    const tiles::Tiles configured(left.height);
    const int64_t tiles = tiles_of(count), pairs = pairs_of(count), strips = strips_of(p);
    const int64_t strip_size = left.steps * kStripStep;
    Chores chores;
    int64_t done = 0;
    for (int64_t strip = 0; strip < strips; strip++, right += strip_size)
        for (int64_t pair = 0; pair < pairs; pair++, done++) {
            const Span share = part(strip_size, pairs, pair);
            float* const block = blocks + done % 2 * tiles::kBlock;
            chores.fetcher = {};
            if (strip + 1 < strips) chores.fetcher.add(right + strip_size + share.begin, share.size() * sizeof(uint16_t));
            chores.begin_pass(left.steps);
            const bool two = 2 * pair + 1 < tiles;
            (two ? tiles::multiply<2, Chores> : tiles::multiply<1, Chores>)(left.at(2 * pair, 0), left.at(2 * pair + 1, 0),
                                                                           right, left.steps, block, chores);
            const Span rows = {pair * 2 * left.height, smaller(count, (pair + 1) * 2 * left.height)};
            chores.finish({p, block, nullptr, true, true, rows, left.height, strip, nullptr});
        }
    chores.finish({});
}

// Chunks of the depth of about equal size.
static int64_t chunk_of(int64_t depth) {
    return ceil_div(ceil_div(depth, ceil_div(depth, kChunk)), tiles::kDepth) * tiles::kDepth;
}

static int64_t rows_of_a_turn(int64_t rows, int threads) {
    const int64_t tiles = tiles_of(rows);
    return tiles::kRows * ceil_div(tiles, threads * ceil_div(tiles, threads * kMostTiles));
}

// Floats of workspace: of a thread, and the parts of a chunk of the right matrix.
static int64_t own_floats(const MatrixProduct& c) {
    const int64_t chunk = chunk_of(c.depth);
    return 2 * tiles::kBlock + left_floats(matmul::rows_of_a_turn(c.rows, c.threads), chunk);
}
static int64_t right_floats(const MatrixProduct& c) {
    return ceil_div(c.columns, kStrip) * tiles::steps_of(chunk_of(c.depth)) * kStripStep / 2;
}
static size_t workspace_bytes(const MatrixProduct& c) {
    return (matmul::own_floats(c) * c.threads + right_floats(c)) * sizeof(float);
}

static void run(const MatrixProduct& c, float* output, float* workspace) {
    const int64_t strips = ceil_div(c.columns, kStrip), turn = matmul::rows_of_a_turn(c.rows, c.threads);
    const int64_t own = matmul::own_floats(c), chunk = chunk_of(c.depth);
    uint16_t* const right = reinterpret_cast<uint16_t*>(workspace + c.threads * own);
#pragma omp parallel num_threads(c.threads)
    for (int64_t begin = 0; begin < c.depth; begin += chunk) {
        const Span depth = {begin, smaller(c.depth, begin + chunk)};
        const int64_t steps = tiles::steps_of(depth.size());
        float* const mine = workspace + omp_get_thread_num() * own;
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < strips; strip++)
            split_right(*c.right, c.columns, strip, depth, right + strip * steps * kStripStep);
#pragma omp for schedule(dynamic, 1)
        for (int64_t row = 0; row < c.rows; row += turn) {
            const Span rows = {row, smaller(c.rows, row + turn)};
            const Left left = left_of(mine + 2 * tiles::kBlock, rows.size(), depth.size());
            split_left(*c.left, rows, depth, left);
            Product p = {};
            p.output = output + row * c.columns;
            p.residual = begin ? p.output : nullptr;
            p.columns = p.output_stride = c.columns;
            multiply_strips(p, left, rows.size(), right, mine);
        }
    }
}

}  // namespace matmul
}  // namespace RK_ISA

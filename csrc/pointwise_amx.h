// Pointwise convolutions by AMX, as accurate as sums of float32 products: see bf16_parts.h.
//
// Each output is a sum in an order of its own, whatever the number of rows and threads: blocks of kDeep steps of channels,
// each summed in the tiles, are added up one after the other.
#pragma once

#include "amx_chores.h"

namespace RK_ISA {
namespace pointwise {

static void split_pixels(const Product& p, Span rows, const Left& left) {
    for (int64_t r = rows.begin; r < rows.end; r++)
        for (int64_t s = 0; s < left.steps; s++) tiles::split_row(p.input + r * p.input_stride, p.depth, s, left.row(r, s));
}

// Strips that a thread takes on, several at a time; `taken` is shared by all threads that compute the product.
struct Turns {
    int64_t* taken;
    int64_t strips, size;
    Span take() const {
        const int64_t begin = smaller(strips, __atomic_fetch_add(taken, size, __ATOMIC_RELAXED));
        return {begin, smaller(strips, begin + size)};
    }
};

// The weights that are multiplied at a time: a strip and a block of channels. All strips of a turn come before the next block.
struct Panel {
    Span turn;
    int64_t strip, step;
    static Panel first(const Turns& turns) {
        const Span turn = turns.take();
        return {turn, turn.begin, 0};
    }
    bool exists() const { return turn.size() > 0; }
    Span steps(int64_t all) const { return {step, smaller(all, step + kDeep)}; }
    Panel next(int64_t all, const Turns& turns) const {
        if (strip + 1 < turn.end) return {turn, strip + 1, step};
        if (step + kDeep < all) return {turn, turn.begin, step + kDeep};
        return first(turns);
    }
};

// A thread's workspace: the parts of the weights of a panel, two blocks of sums, and sums over several blocks of channels.
struct Own {
    static constexpr int64_t kRightFloats = kDeep * kStripStep / 2;
    float* memory;
    uint16_t* right() const { return reinterpret_cast<uint16_t*>(memory); }
    float* block(int64_t pair) const { return memory + kRightFloats + pair % 2 * tiles::kBlock; }
    float* sums(int64_t index) const { return memory + kRightFloats + (2 + index) * tiles::kBlock; }
    static int64_t floats(const Product& p, int64_t pairs, int64_t strips) {
        return kRightFloats + (2 + (tiles::steps_of(p.depth) > kDeep ? pairs * strips : 0)) * tiles::kBlock;
    }
};

// What comes after a pass over a pair of tiles: a share of the next panel's weights, and of this pair's channels of the next
// block.
static Fetcher fetch_next(const Product& p, const Left& left, const Panel& panel, const Panel& then, int64_t pair,
                          int64_t pairs, int64_t tiles) {
    Fetcher fetcher;
    if (!then.exists()) return fetcher;
    const Span steps = then.steps(left.steps);
    const Span rows = part(smaller(p.depth, steps.end * tiles::kDepth) - steps.begin * tiles::kDepth, pairs, pair);
    for (int64_t i = 0; i < 2; i++)
        fetcher.add(weights_at(p, steps.begin * tiles::kDepth + rows.begin, then.strip * kStrip + i * kPanel).data,
                    rows.size() * kPanel * sizeof(float));
    if (panel.step + kDeep >= left.steps) return fetcher;
    const Span block = {panel.step + kDeep, smaller(left.steps, panel.step + 2 * kDeep)};
    const Span share = part(block.size(), panel.turn.size(), panel.strip - panel.turn.begin);
    for (int64_t tile = 2 * pair; tile < smaller(tiles, 2 * pair + 2); tile++)
        fetcher.add(left.at(tile, block.begin + share.begin), share.size() * tiles::kStep * sizeof(uint16_t));
    return fetcher;
}

// The product of `count` rows, whose parts are `left`, with the strips that the calling thread takes.
static void compute_turns(const Product& p, const Left& left, int64_t count, const Turns& turns, const Own& own,
                          const Left* next) {
    const tiles::Tiles configured(left.height);
    const int64_t tiles = tiles_of(count), pairs = pairs_of(count);
    Chores chores;
    int64_t done = 0;  // pairs of tiles
    Panel panel = Panel::first(turns);
    if (panel.exists()) chores.splitter = {p, panel.strip, panel.steps(left.steps), own.right()};
    while (panel.exists()) {
        const Span steps = panel.steps(left.steps);
        const Panel then = panel.next(left.steps, turns);
        for (int64_t pair = 0; pair < pairs; pair++, done++) {
            chores.last_pass = pair + 1 == pairs;
            if (done == 0 || steps.size() == 1 || chores.last_pass) chores.splitter.rest();
            if (chores.last_pass)
                chores.splitter = then.exists() ? WeightSplitter(p, then.strip, then.steps(left.steps), own.right())
                                                : WeightSplitter();
            chores.fetcher = fetch_next(p, left, panel, then, pair, pairs, tiles);
            chores.begin_pass(steps.size());
            const bool two = 2 * pair + 1 < tiles;
            (two ? tiles::multiply<2, Chores> : tiles::multiply<1, Chores>)(
                left.at(2 * pair, steps.begin), left.at(2 * pair + 1, steps.begin), own.right(), steps.size(), own.block(done),
                chores);
            if (chores.last_pass && then.steps(left.steps).size() != steps.size()) chores.splitter.rest();
            const Span rows = {pair * 2 * left.height, smaller(count, (pair + 1) * 2 * left.height)};
            chores.finish({p, own.block(done), own.sums((panel.strip - panel.turn.begin) * pairs + pair), steps.begin == 0,
                           steps.end == left.steps, rows, left.height, panel.strip, next});
        }
        panel = then;
    }
    chores.finish({});
}

// Whether it is faster, for maps of so many pixels; measured. Nothing else decides, lest results depend on the batch.
static bool amx_pays(const rk_layer& layer, int64_t pixels) {
    const bool fits = pixels >= 32 && layer.in_channels >= 64 && layer.out_channels >= 64;
    return fits && pixels * layer.in_channels * layer.out_channels >= 1 << 23;
}

// Floats of workspace: of a thread, and the parts of the pixels of both products.
struct AmxFloats {
    int64_t own, first, second;
    int64_t all() const { return own + first + second; }
};

// Rows that a thread takes through all layers at once: so few that the parts of the hidden channels stay in the second level
// cache, so many that splitting all weights for them is little beside.
constexpr int64_t kTurnTiles = 14;
static int64_t rows_of_a_turn(int64_t rows, int threads) {
    const int64_t tiles = tiles_of(rows);
    return tiles::kRows * ceil_div(tiles, threads * ceil_div(tiles, threads * kTurnTiles));
}

static AmxFloats turn_floats(const Product& first, const Product* second, int64_t rows, int threads) {
    const int64_t turn = rows_of_a_turn(rows, threads);
    const auto own = [&](const Product& p) { return Own::floats(p, pairs_of(turn), strips_of(p)); };
    return {second ? larger(own(first), own(*second)) : own(first), left_floats(turn, first.depth),
            second ? left_floats(turn, second->depth) : 0};
}

static int64_t amx_by_rows_floats(const Product& first, const Product* second, int64_t rows, int threads) {
    return threads * turn_floats(first, second, rows, threads).all();
}

// Every thread takes some rows through both layers.
static void amx_by_rows(const Product& first, const Product* second, int64_t rows, int threads, float* workspace) {
    const int64_t turn = rows_of_a_turn(rows, threads);
    const AmxFloats floats = turn_floats(first, second, rows, threads);
    const auto compute = [&](const Product& p, const Left& left, int64_t count, const Own& own, const Left* next) {
        int64_t taken = 0;
        compute_turns(p, left, count, {&taken, strips_of(p), strips_of(p)}, own, next);
    };
#pragma omp parallel num_threads(threads)
    {
        const Own own = {workspace + omp_get_thread_num() * floats.all()};
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < rows; begin += turn) {
            const int64_t count = smaller(turn, rows - begin);
            const Product up = from_row(first, begin);
            const Left left = left_of(own.memory + floats.own, count, first.depth);
            split_pixels(up, {0, count}, left);
            if (second) {
                const Left hidden = left_of(own.memory + floats.own + floats.first, count, second->depth);
                compute(up, left, count, own, &hidden);
                compute(from_row(*second, begin), hidden, count, own, nullptr);
            } else {
                compute(up, left, count, own, nullptr);
            }
        }
    }
}

constexpr int64_t kLayerRows = 768;  // rows that go through a layer before the next

// Where the channels come in several blocks, each thread takes its strips at once, since every turn reads all pixels again.
static int64_t strips_of_a_turn(const Product& p, int threads) {
    return tiles::steps_of(p.depth) > kDeep ? ceil_div(strips_of(p), threads)
                                            : larger(1, smaller(4, strips_of(p) / (2 * threads)));
}

static AmxFloats layer_floats(const Product& first, const Product* second, int64_t rows, int threads) {
    const auto own = [&](const Product& p) { return Own::floats(p, pairs_of(rows), strips_of_a_turn(p, threads)); };
    return {second ? larger(own(first), own(*second)) : own(first), left_floats(rows, first.depth),
            second ? left_floats(rows, second->depth) : 0};
}

static int64_t rows_of_a_chunk(int64_t rows) { return ceil_div(rows, ceil_div(rows, kLayerRows)); }

static int64_t amx_by_layers_floats(const Product& first, const Product* second, int64_t rows, int threads) {
    const AmxFloats floats = layer_floats(first, second, rows_of_a_chunk(rows), threads);
    return floats.own * threads + floats.first + floats.second;
}

// One layer after the other: each thread reads all rows and splits its part of the weights.
static void amx_by_layers(const Product& first, const Product* second, int64_t rows, int threads, float* workspace) {
    const int64_t chunk = rows_of_a_chunk(rows);
    const AmxFloats floats = layer_floats(first, second, chunk, threads);
    float* const shared = workspace + threads * floats.own;
    for (int64_t begin = 0; begin < rows; begin += chunk) {
        const int64_t count = smaller(chunk, rows - begin), tiles = tiles_of(count);
        const Product up = from_row(first, begin), down = second ? from_row(*second, begin) : up;
        const Left left = left_of(shared, count, first.depth);
        const Left hidden = second ? left_of(shared + floats.first, count, second->depth) : left;
        int64_t taken[2] = {0, 0};
#pragma omp parallel num_threads(threads)
        {
            const Own own = {workspace + omp_get_thread_num() * floats.own};
            const auto compute = [&](const Product& p, const Left& pixels, int64_t* counter, const Left* next) {
                compute_turns(p, pixels, count, {counter, strips_of(p), strips_of_a_turn(p, threads)}, own, next);
            };
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < tiles; tile++)
                split_pixels(up, {smaller(count, tile * left.height), smaller(count, (tile + 1) * left.height)}, left);
            compute(up, left, &taken[0], second ? &hidden : nullptr);
            if (second) {
#pragma omp barrier
                compute(down, hidden, &taken[1], nullptr);
            }
        }
    }
}

}  // namespace pointwise
}  // namespace RK_ISA

// Pointwise convolutions by AMX, as accurate as sums of float32 products: see bf16_parts.h.
//
// Each output is a sum in an order of its own, whatever the number of rows and threads: blocks of kDeep steps of channels,
// each summed in the tiles, are added up one after the other. While tiles are multiplied, the thread finishes the sums before
// and splits the weights after.
#pragma once

#include "bf16_parts.h"
#include "pointwise_tile.h"

namespace RK_ISA {
namespace pointwise {

using tiles::Left;

constexpr int64_t kDeep = 16;                     // steps of a block of channels: 512
constexpr int64_t kStrip = RK_COLUMNS;            // channels of two tiles of weights side by side
constexpr int64_t kStripStep = 2 * tiles::kStep;  // bfloat16 numbers of a strip of weights, a step of channels

static RK_INLINE int64_t strips_of(const Product& p) { return ceil_div(p.columns, kStrip); }

// Rows in tiles of equal height; tiles are multiplied in pairs.
static RK_INLINE int64_t tiles_of(int64_t rows) { return ceil_div(rows, tiles::kRows); }
static RK_INLINE int64_t pairs_of(int64_t rows) { return ceil_div(tiles_of(rows), 2); }
static RK_INLINE Left left_of(float* memory, int64_t rows, int64_t depth) {
    return {reinterpret_cast<uint16_t*>(memory), tiles::steps_of(depth), ceil_div(rows, tiles_of(rows))};
}
static RK_INLINE int64_t left_floats(int64_t rows, int64_t depth) {
    return tiles_of(rows) * tiles::steps_of(depth) * tiles::kStep / 2;
}

static void split_pixels(const Product& p, Span rows, const Left& left) {
    for (int64_t r = rows.begin; r < rows.end; r++)
        for (int64_t s = 0; s < left.steps; s++) tiles::split_row(p.input + r * p.input_stride, p.depth, s, left.row(r, s));
}

// The parts of the weights of a strip for a block of channels, made one line at a time: for each step, for each part, two
// tiles. They take the place of the block before, of which `free` steps are read.
class WeightSplitter {
   public:
    int64_t free = 0;

    WeightSplitter() = default;
    WeightSplitter(const Product& p, int64_t strip, Span steps, uint16_t* to)
        : weights_(weights_at(p, steps.begin * tiles::kDepth, strip * kStrip).data),
          to_(to),
          apart_(p.depth * kPanel),
          depth_(smaller(p.depth, steps.end * tiles::kDepth) - steps.begin * tiles::kDepth),
          steps_(steps.size()) {}
    int64_t left() const { return steps_ - step_; }
    void some(int64_t lines) {
        for (int64_t i = 0; i < lines && step_ < smaller(free, steps_); i++) line();
    }
    void rest() {
        free = steps_;
        while (left()) line();
    }

   private:
    static constexpr int64_t kAhead = 2 * tiles::kDepth * kPanel;  // floats that are fetched ahead

    void line() {
        const float* rows = weights_ + line_ % 2 * apart_ + line_ / 2 * kPanel;
        const int64_t lower = step_ * tiles::kDepth + line_ / 2, upper = lower + tiles::kRows;
        __builtin_prefetch(rows + kAhead);
        __builtin_prefetch(rows + kAhead + tiles::kRows * kPanel);
        UVec parts[tiles::kParts];
        tiles::split(lower < depth_ ? load(rows) : Vec{}, upper < depth_ ? load(rows + tiles::kRows * kPanel) : Vec{}, parts);
        uint16_t* to = to_ + line_ % 2 * tiles::kSize + line_ / 2 * tiles::kDepth;
        for (int i = 0; i < tiles::kParts; i++) memcpy(to + i * 2 * tiles::kSize, &parts[i], sizeof parts[i]);
        if (++line_ < kLines) return;
        line_ = 0;
        step_++;
        weights_ += tiles::kDepth * kPanel;
        to_ += kStripStep;
    }

    static constexpr int64_t kLines = 2 * tiles::kRows;  // of a step
    const float* weights_ = nullptr;
    uint16_t* to_ = nullptr;
    int64_t apart_ = 0, depth_ = 0, steps_ = 0, step_ = 0, line_ = 0;
};

// From the sums of a pair of tiles, a strip and a block of channels to their results, one row at a time: rows of the output,
// or of the next product's pixels.
class Finisher {
   public:
    Finisher() = default;
    // `block` has the sums of one block of channels, `sums` those of the blocks before, unless this is the `first`, and then
    // of this one too, unless it is the `last`.
    Finisher(const Product& p, const float* block, float* sums, bool first, bool last, Span rows, int64_t height, int64_t strip,
             const Left* next)
        : p_(&p),
          block_(block),
          sums_(sums),
          to_(next ? next->row(rows.begin, strip) : nullptr),
          to_below_(next ? next->steps * tiles::kStep - height * tiles::kDepth : 0),
          offset_(rows.begin * p.output_stride + strip * kStrip),
          left_(rows.size()),
          height_(height),
          above_(height),
          column_(strip * kStrip),
          first_(first),
          last_(last) {}
    int64_t left() const { return left_; }
    void some(int64_t rows) {
        for (int64_t i = smaller(rows, left_); i > 0; i--) row();
    }

   private:
    void row() {
        Vec v[2];
        for (int i = 0; i < 2; i++) v[i] = load(block_ + i * kLanes);
        if (!first_)
            for (int i = 0; i < 2; i++) v[i] = v[i] + load(sums_ + i * kLanes);
        if (last_)
            finish(v);
        else
            for (int i = 0; i < 2; i++) store(sums_ + i * kLanes, v[i]);
        block_ += kStrip;
        sums_ += kStrip;
        left_--;
        if (--above_) return;
        block_ += (tiles::kRows - height_) * kStrip;
        to_ += to_below_;
    }
    void finish(Vec* v) {
        for (int i = 0; i < 2; i++) v[i] = activated(*p_, v[i] + load(p_->bias + column_ + i * kLanes));
        if (to_) {
            tiles::store_parts(to_, v[0], v[1]);
            to_ += tiles::kDepth;
            return;
        }
        const int64_t valid = p_->columns - column_;
        for (int i = 0; i < 2 && i * kLanes < valid; i++) {
            const int lanes = int(smaller(kLanes, valid - i * kLanes));
            float* output = p_->output + offset_ + i * kLanes;
            const float* residual = p_->residual ? p_->residual + offset_ + i * kLanes : nullptr;
            if (lanes == kLanes)
                store(output, residual ? v[i] + load(residual) : v[i]);
            else
                store_some(output, residual ? v[i] + load_some(residual, lanes) : v[i], lanes);
        }
        offset_ += p_->output_stride;
    }

    const Product* p_ = nullptr;
    const float* block_ = nullptr;
    float* sums_ = nullptr;
    uint16_t* to_ = nullptr;
    int64_t to_below_ = 0, offset_ = 0, left_ = 0, height_ = 0, above_ = 0, column_ = 0;
    bool first_ = false, last_ = false;
};

// Memory that is brought into the second level cache, in several pieces.
class Fetcher {
   public:
    void add(const void* data, int64_t bytes) {
        if (!bytes) return;
        pieces_[count_++] = {static_cast<const char*>(data), bytes};
        left_ += ceil_div(bytes, kLineBytes);
    }
    int64_t left() const { return left_; }
    void some(int64_t lines) {
        for (int64_t i = smaller(lines, left_); i > 0; i--, left_--) {
            Piece& piece = pieces_[current_];
            __builtin_prefetch(piece.data, 0, 2);
            piece.data += kLineBytes;
            piece.bytes -= kLineBytes;
            if (piece.bytes <= 0) current_++;
        }
    }

   private:
    static constexpr int64_t kLineBytes = 64;
    struct Piece {
        const char* data;
        int64_t bytes;
    } pieces_[4];
    int64_t count_ = 0, current_ = 0, left_ = 0;
};

// What a thread does while tiles are multiplied.
struct Chores {
    Finisher finisher;
    WeightSplitter splitter;
    Fetcher fetcher;
    bool last_pass = false;  // over the weights, whose place becomes free
    int64_t rows = 0, lines = 0, delay = 0;

    static constexpr int64_t kDelay = 3;  // until the sums of the tiles before have reached the cache
    static constexpr int64_t kSplit = ceil_div(2 * tiles::kRows, tiles::kChores);

    void finish(const Finisher& next) {
        finisher.some(finisher.left());
        finisher = next;
    }
    void begin_pass(int64_t steps) {
        delay = kDelay;
        rows = ceil_div(finisher.left(), steps * tiles::kChores - kDelay);
        lines = ceil_div(fetcher.left(), steps * tiles::kChores);
    }
    __attribute__((noinline)) void some() {
        if (delay)
            delay--;
        else
            finisher.some(rows);
        splitter.some(kSplit);
        fetcher.some(lines);
    }
    void step() { splitter.free += last_pass; }
};

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

static Product from_row(Product p, int64_t row) {
    if (p.input) p.input += row * p.input_stride;
    if (p.output) p.output += row * p.output_stride;
    if (p.residual) p.residual += row * p.output_stride;
    return p;
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

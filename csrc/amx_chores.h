// What a thread does while tiles are multiplied: it finishes the sums before, and splits and fetches the weights after.
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
        for (int i = 0; i < 2; i++)
            v[i] = activated(p_->activation, p_->bias ? v[i] + load(p_->bias + column_ + i * kLanes) : v[i]);
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

}  // namespace pointwise
}  // namespace RK_ISA

// Float32 numbers as sums of three bfloat16 numbers, in the tiles that AMX multiplies.
//
// Each part is 8 bits of the 24 that the ones before it leave, the first rounded to nearest, so the sum is exact unless a part
// is below the smallest normal number, 1.2e-38, which AMX takes for zero. Of the nine products of parts the six largest are
// computed; those left out are at most 2^-22 of x * y. A number that is not finite, or above 3.38e38, makes a NaN.
#pragma once

#include "simd.h"

namespace RK_ISA {
namespace tiles {

constexpr int kParts = 3;
constexpr int64_t kRows = 16, kDepth = 32, kColumns = 16;  // of a tile of pixels, of both, of a tile of weights
constexpr int64_t kSize = kRows * kDepth;                  // bfloat16 numbers of a tile
constexpr int64_t kStep = kParts * kSize;                  // of a tile's parts, kDepth channels

// The parts of 32 numbers; lane i of `lower` and lane i of `upper` become neighbours. (Instructions that convert to bfloat16
// take four times as long as these.)
static RK_INLINE void split(Vec lower, Vec upper, UVec parts[kParts]) {
    constexpr uint32_t kUpperHalf = 0xffff0000, kHalfUnit = 0x8000;
    for (int i = 0; i < kParts; i++) {
        const UVec round = UVec{} + (i ? 0 : kHalfUnit);
        const UVec low = (UVec)lower + round, high = ((UVec)upper + round) & kUpperHalf;
        parts[i] = high | low >> 16;
        lower -= (Vec)(low & kUpperHalf);
        upper -= (Vec)high;
    }
}

// Writes the parts of 32 numbers to the same place of three tiles that follow each other.
static RK_INLINE void store_parts(uint16_t* to, Vec lower, Vec upper) {
    UVec parts[kParts];
    split(lower, upper, parts);
    for (int i = 0; i < kParts; i++) memcpy(to + i * kSize, &parts[i], sizeof parts[i]);
}

// Rows of pixels in tiles of `height` rows: for each tile, for each step of kDepth channels, its parts.
struct Left {
    uint16_t* data;
    int64_t steps, height;
    uint16_t* at(int64_t tile, int64_t step) const { return data + (tile * steps + step) * kStep; }
    uint16_t* row(int64_t row, int64_t step) const { return at(row / height, step) + row % height * kDepth; }
};

static RK_INLINE int64_t steps_of(int64_t channels) { return (channels + kDepth - 1) / kDepth; }

// The channels of one row from `step * kDepth` on, up to kDepth of them.
static RK_INLINE void split_row(const float* row, int64_t channels, int64_t step, uint16_t* to) {
    const int64_t left = channels - step * kDepth;
    const float* x = row + step * kDepth;
    if (left >= kDepth)
        store_parts(to, load(x), load(x + kLanes));
    else
        store_parts(to, load_some(x, int(left < kLanes ? left : kLanes)),
                    left > kLanes ? load_some(x + kLanes, int(left - kLanes)) : Vec{});
}

// What vectors wrote before it, tiles read after it, and the other way round: intrinsics of tiles do not tell the compiler.
static RK_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

static RK_INLINE void multiply_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// Configures the tiles of the calling thread while it lives: four of sums and two of pixels, of `height` rows, and two of
// weights.
struct Tiles {
    explicit Tiles(int64_t height) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; i++) shape.bytes[i] = kDepth * 2, shape.rows[i] = uint8_t(i < 6 ? height : kRows);
        memory_barrier();
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// sums[kLeft * kRows][2 * kColumns] = kLeft (1 or 2) tiles of pixels, whose parts start at `left` and `below`, @ two tiles of
// weights over some steps. A product of tiles takes 16 cycles in which the rest of the core is idle: `chores.some()` is called
// kChores times a step, `chores.step()` after it, when its weights are read.
//
// A Xeon with AMX takes 0.2 us longer to store a tile after more than about 130 products without any; hence the idle store.
constexpr int64_t kBlock = 2 * kRows * 2 * kColumns;  // floats of the sums
constexpr int kChores = 6, kStepsPerStore = 4;
template <int kLeft, class Chores>
static RK_INLINE void multiply(const uint16_t* left, const uint16_t* below, const uint16_t* right, int64_t steps, float* sums,
                               Chores& chores) {
    constexpr int64_t kLine = kDepth * 2, kStride = 2 * kColumns * sizeof(float), kBelow = kRows * 2 * kColumns;
    const auto load_left = [&](int64_t step, int part) {
        _tile_loadd(4, left + step * kStep + part * kSize, kLine);
        if constexpr (kLeft == 2) _tile_loadd(5, below + step * kStep + part * kSize, kLine);
    };
    const auto load_right = [&](int64_t step, int part) {
        _tile_loadd(6, right + (step * kParts + part) * 2 * kSize, kLine);
        _tile_loadd(7, right + (step * kParts + part) * 2 * kSize + kSize, kLine);
    };
    const auto multiply_tiles = [&] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kLeft == 2) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        chores.some();
    };
    memory_barrier();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; s++) {
        if (s % kStepsPerStore == kStepsPerStore - 1) _tile_stored(4, sums, 0);
        load_left(s, 2);
        load_right(s, 0);
        multiply_tiles();
        load_left(s, 1);
        multiply_tiles();
        load_right(s, 1);
        multiply_tiles();
        load_left(s, 0);
        multiply_tiles();
        load_right(s, 2);
        multiply_tiles();
        load_right(s, 0);
        multiply_tiles();
        chores.step();
    }
    _tile_stored(0, sums, kStride);
    _tile_stored(1, sums + kColumns, kStride);
    if constexpr (kLeft == 2) {
        _tile_stored(2, sums + kBelow, kStride);
        _tile_stored(3, sums + kBelow + kColumns, kStride);
    }
    memory_barrier();
}

}  // namespace tiles
}  // namespace RK_ISA

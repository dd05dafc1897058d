// What the passes of the direct algorithm share: tiles, and the parts of tensors they read.
#pragma once

#include "direct_tile.h"
#include "kernels.h"

namespace RK_ISA {
namespace direct {

constexpr int64_t kTileBytes = 192 << 10;
constexpr int64_t kTileCols = 280;
constexpr int64_t kMinJobs = 32;  // a constant, so that results do not depend on the number of threads

struct Tiling {
    int64_t rows, cols;              // of the tile in its sub-lattice
    int64_t row_tiles, col_tiles;
};

static int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t pitch_of(int64_t cols) { return (cols | 1) * kLanes; }  // rows fall in different cache sets

// Splits rows x cols evenly into tiles that fit the budget with their halo of taps_h x taps_w, of at most `most_rows`.
static Tiling tile(int64_t rows, int64_t cols, int64_t taps_h, int64_t taps_w, int64_t most_rows,
                   int64_t jobs_per_tile) {
    Tiling t;
    t.col_tiles = divide_up(cols, kTileCols);
    t.cols = divide_up(cols, t.col_tiles);
    const int64_t fit = kTileBytes / (pitch_of(t.cols + taps_w - 1) * int64_t(sizeof(float))) - (taps_h - 1);
    t.row_tiles = divide_up(rows, at_most(most_rows, at_least(fit, at_least(4, taps_h / 2))));
    const int64_t wanted = divide_up(kMinJobs, jobs_per_tile * t.col_tiles);
    t.row_tiles = at_least(t.row_tiles, at_most(wanted, rows / at_least(8, taps_h)));
    t.row_tiles = at_least(1, t.row_tiles);
    t.rows = divide_up(rows, t.row_tiles);
    t.row_tiles = divide_up(rows, t.rows);
    return t;
}

struct Axes {
    Axis h, w;
};

static Axes axes(const rk_problem& p) {
    return {{p.in_h, p.out_h, p.kernel_h, p.stride_h, p.dilation_h, p.pad_top},
            {p.in_w, p.out_w, p.kernel_w, p.stride_w, p.dilation_w, p.pad_left}};
}

static Image lattice_of(Image image, const Lattice& h, const Lattice& w) {
    image.data += (h.first * image.h + w.first * image.w) * (image.dtype == RK_F32 ? 4 : 2);
    image.h *= h.step;
    image.w *= w.step;
    image.rows = h.count;
    image.cols = w.count;
    return image;
}

struct Buffers {
    const float* filter;
    float *x, *y;
};

static int64_t filter_floats(const rk_problem& p) { return int64_t(p.kernel_h) * p.kernel_w * kLanes; }

// Reverses the order of the taps of a packed filter.
static void flip(float* filter, int64_t taps) {
    for (int64_t tap = 0, last = taps - 1; tap < last; tap++, last--) {
        const Vec v = load(filter + tap * kLanes);
        store(filter + tap * kLanes, load(filter + last * kLanes));
        store(filter + last * kLanes, v);
    }
}

// Writes the filters of a group tap by tap. An input gradient is a forward pass from the output gradient with flipped
// filters, whose taps are written from the last to the first.
static void read_filter(const rk_problem& p, const float* weight, int64_t group, float* filter) {
    read_tile(filter_image(p, weight, group), 0, 0, p.kernel_h, p.kernel_w, filter, p.kernel_w * kLanes);
    if (p.pass == RK_GRAD_INPUT) flip(filter, int64_t(p.kernel_h) * p.kernel_w);
}

static int64_t tile_floats(int64_t rows, int64_t cols) { return rows * pitch_of(cols); }

// Whether pixels `step` floats apart are read where they lie: filters of few columns use an input too rarely to pay for
// a packed copy. But the rows that 7 taps reach evict each other from the first level cache at a multiple of 512 bytes.
static bool reads_in_place(int64_t taps, int64_t step) {
    return taps == 3 || taps == 5 || (taps == 7 && step % 128 != 0);
}

constexpr int64_t kCachedBytes = 4 << 20;  // measured

// Whether the images are so large that fetching them ahead pays.
static bool outgrows_caches(const rk_problem& p) {
    return p.batch * p.channels * (p.in_h * p.in_w + p.out_h * p.out_w) * int64_t(sizeof(float)) > kCachedBytes;
}

// Part of an axis that a tile of outputs reads.
struct Reach {
    int64_t begin, count, pad;  // pad: of the tile with respect to `begin`
};

static Reach reach(int64_t begin, int64_t count, int64_t taps, int64_t pad, int64_t size) {
    const int64_t first = at_least(0, begin - pad), end = at_most(size, begin + count - 1 + taps - pad);
    return {first, at_least(0, end - first), first - begin + pad};
}

}  // namespace direct
}  // namespace RK_ISA

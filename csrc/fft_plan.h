// Geometry of an FFT convolution: which taps matter, transform sizes, tiles, and the transforms themselves.
//
// Every pass is, along each axis, one of
//   forward, input gradient   out[o] = sum over m of kernel[m] in[o + m - pad]
//   weight gradient           kernel[m] = sum over o of out[o] in[o + m - pad]
// (the input gradient with in and out exchanged, the kernel reversed and pad -> taps - 1 - pad), computed as the
// product of the transforms of `in` and of the reversed kernel, or of `in` and the conjugate of that of `out`. A circular
// transform may be shorter than the linear convolution, as long as no alias reaches a value that is wanted.
#pragma once

#include "fft_transform.h"
#include "processor.h"
#include "replknet_core.h"

namespace RK_ISA::spectral {

struct FftSize {
    int outer, inner;
    constexpr int points() const { return outer * inner; }
};

constexpr FftSize kFftSizes[] = {
    {4, 4},   {4, 5},  {4, 6},   {5, 5},   {4, 7},   {5, 6},  {4, 8},  {5, 7},  {4, 9},   {5, 8},  {6, 7},  {5, 9},
    {6, 8},   {7, 7},  {5, 10},  {6, 9},   {7, 8},   {5, 12}, {7, 9},  {8, 8},  {7, 10},  {8, 9},  {8, 10}, {9, 9},
    {7, 12},  {9, 10}, {8, 12},  {10, 10}, {9, 12},  {7, 16}, {10, 12}, {8, 16}, {12, 12}, {10, 16}, {12, 16}, {16, 16},
};

// One axis of a problem.
struct Axis {
    int64_t in, out;
    int64_t taps, first_tap;  // those of the dilated kernel that touch any input
    int64_t dilation;
    int64_t pad;
    int64_t window, step;    // inputs and outputs of a tile
    int64_t origin;          // tile t reads inputs from t * step + origin
    int64_t tiles;
    int data_shift, kernel_shift;
    FftSize size;

    int64_t outputs(int64_t tile) const { return tile + 1 < tiles ? step : out - tile * step; }
    int64_t start(int64_t tile) const { return tile * step + origin; }
};

constexpr int kMaxBlock = 4;
constexpr int64_t kMostFloats = 15 << 17;  // of planes and spectra of a thread: 7.5 MiB
constexpr int kLineGroups = RK_FILTER_LANES / kLanes;  // groups that share cache lines where channels are adjacent

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// taps <= 0 when no tap touches any input.
static Axis make_axis(int64_t in, int64_t out, int64_t kernel, int64_t dilation, int64_t pad, bool transposed) {
    const int64_t span = (kernel - 1) * dilation + 1;
    if (transposed) pad = span - 1 - pad;
    Axis axis = {};
    axis.in = in;
    axis.out = out;
    const int64_t first = most(0, pad - out + 1), last = least(span, pad + in);
    axis.taps = last - first;
    axis.first_tap = transposed ? span - last : first;
    axis.dilation = dilation;
    axis.pad = pad - first;
    return axis;
}

// Smallest transform of the whole axis.
static int64_t whole_points(const Axis& axis) {
    return most(most(axis.in, axis.out), most(axis.in + axis.pad, axis.out + axis.taps - 1 - axis.pad));
}

static void lay_whole(Axis& axis, FftSize size, bool weight_gradient) {
    axis.size = size;
    axis.window = axis.in;
    axis.step = axis.out;
    axis.origin = 0;
    axis.tiles = 1;
    axis.data_shift = weight_gradient ? int(-axis.pad) : 0;
    axis.kernel_shift = int(axis.taps - 1 - axis.pad);
}

// Overlap-save: each tile's window holds all that its outputs need.
static void lay_tiles(Axis& axis, FftSize size, bool weight_gradient) {
    axis.size = size;
    const int64_t room = size.points() - (axis.taps - 1);
    axis.tiles = (axis.out + room - 1) / room;
    axis.step = (axis.out + axis.tiles - 1) / axis.tiles;
    axis.tiles = (axis.out + axis.step - 1) / axis.step;
    axis.window = axis.step + axis.taps - 1;
    axis.origin = -axis.pad;
    axis.data_shift = 0;
    axis.kernel_shift = weight_gradient ? 0 : int(axis.taps - 1);
}

// Lays the axis out for one transform size; false if it is too small, or too small for tiles to pay.
static bool lay_out(Axis& axis, FftSize size, bool weight_gradient) {
    if (size.points() >= whole_points(axis))
        lay_whole(axis, size, weight_gradient);
    else if (2 * size.points() >= 3 * axis.taps)
        lay_tiles(axis, size, weight_gradient);
    else
        return false;
    return true;
}

// Cost of all tiles of one image. A point costs about the same in every transform (moving it outweighs computing with
// it), and more the more planes and spectra outgrow the caches.
static double tiling_cost(const Axis& rows, const Axis& cols) {
    constexpr double kCacheBytes = 8 << 20;
    const double height = rows.size.points(), width = cols.size.points();
    const double bytes = width * 2 * height * kLanes * sizeof(float);
    return double(rows.tiles * cols.tiles) * width * (rows.window + rows.step + 2 * height) * (1 + bytes / kCacheBytes);
}

struct Plan {
    Axis rows, cols;
    int groups, bins;
    int block;   // groups whose rows are transformed together
    int others;  // planes of the other factor: of a filter, or of a block's output gradient
    int line;    // groups that are read and written together: a block, or more, one plane after the other
    int lines;   // some of them shorter
    int64_t images, tiles;
    bool reversed;     // the taps are read backwards
    float scale;       // of the last pass
    int64_t plane_rows;

    // Groups that stay in one line.
    int unit() const { return line < kLineGroups ? line : kLineGroups; }
    int64_t units() const { return (groups + unit() - 1) / unit(); }
    int first_group(int64_t of_line) const { return int(least(groups, units() * of_line / lines * unit())); }

    int64_t pitch() const { return plane_rows * kComplex; }  // of a plane, from bin to bin
    int64_t plane_floats() const { return bins * pitch(); }
    int64_t spectrum_floats() const { return int64_t(bins) * rows.size.points() * kComplex; }
};

// A filter used once is multiplied column by column and never stored as a spectrum.
static bool filter_used_once(const Plan& plan) { return plan.images * plan.tiles == 1; }

// Whether every thread has as little to do if so many groups stay together; a group's tiles may be shared by threads.
static bool shares_evenly(const Plan& plan, int64_t tiles, int threads, int groups) {
    const int64_t all = plan.groups * tiles;
    const int64_t items = (plan.groups + groups - 1) / groups * tiles;
    return least((items + threads - 1) / threads * groups, all) <= (all + threads - 1) / threads;
}

// Where channels are adjacent, memory delivers several groups of a pixel up to three times as fast as one group of many
// pixels. Measured: planes and spectra of a block must fit in a quarter of the cache; on Intel's processors a block is two
// lines of a pixel, which must fit in half of the cache in weight gradients.
static void choose_line(Plan& plan, const rk_problem& p, int64_t tiles) {
    const bool weight_gradient = p.pass == RK_GRAD_WEIGHT;
    plan.block = plan.line = plan.others = 1;
    if (p.input_stride[1] != 1 || p.output_stride[1] != 1 || (weight_gradient && !intel())) return;
    const bool has_spectrum = weight_gradient || !filter_used_once(plan);
    const int64_t floats = (weight_gradient ? 2 : 1) * plan.plane_floats() + (has_spectrum ? plan.spectrum_floats() : 0);
    const auto fits = [&](int block) {
        const int64_t bytes = block * floats * sizeof(float);
        if (!intel()) return 4 * bytes <= cache_bytes();
        if (block * kLanes > 2 * kLine) return false;
        if (weight_gradient) return 2 * bytes <= cache_bytes();
        return (block + 1) * plan.plane_floats() + block * plan.spectrum_floats() <= kMostFloats;
    };
    for (plan.block = kMaxBlock; plan.block > 1; plan.block /= 2)
        if (fits(plan.block) && (intel() || shares_evenly(plan, tiles, p.threads, plan.block))) break;
    if (weight_gradient) {
        plan.line = plan.others = plan.block;
        return;
    }
    plan.line = plan.block < kLineGroups && shares_evenly(plan, tiles, p.threads, kLineGroups) ? kLineGroups : plan.block;
    if (plan.line > plan.block) plan.block = 1;
}

// Threads that cannot share full lines evenly share shorter ones.
static void choose_groups(Plan& plan, const rk_problem& p) {
    const int64_t tiles = p.pass == RK_GRAD_WEIGHT ? 1 : plan.images * plan.tiles;
    choose_line(plan, p, tiles);
    plan.lines = (plan.groups + plan.line - 1) / plan.line;
    if (!shares_evenly(plan, tiles, p.threads, plan.line))
        plan.lines = int(least((plan.lines + p.threads - 1) / p.threads * p.threads, plan.units()));
}

// False if the problem cannot be planned.
static bool make_plan(const rk_problem& p, Plan& plan) {
    if (p.stride_h != 1 || p.stride_w != 1 || p.in_h < 1 || p.in_w < 1 || p.out_h < 1 || p.out_w < 1) return false;
    const bool transposed = p.pass == RK_GRAD_INPUT, weight_gradient = p.pass == RK_GRAD_WEIGHT;
    const int64_t in_h = transposed ? p.out_h : p.in_h, out_h = transposed ? p.in_h : p.out_h;
    const int64_t in_w = transposed ? p.out_w : p.in_w, out_w = transposed ? p.in_w : p.out_w;
    Axis rows = make_axis(in_h, out_h, p.kernel_h, p.dilation_h, p.pad_top, transposed);
    Axis cols = make_axis(in_w, out_w, p.kernel_w, p.dilation_w, p.pad_left, transposed);
    if (rows.taps < 1 || cols.taps < 1) return false;

    double best = 0;
    for (const FftSize row_size : kFftSizes) {
        if (!lay_out(rows, row_size, weight_gradient)) continue;
        for (const FftSize col_size : kFftSizes) {
            if (!lay_out(cols, col_size, weight_gradient)) continue;
            const double cost = tiling_cost(rows, cols);
            if (best == 0 || cost < best) {
                best = cost;
                plan.rows = rows;
                plan.cols = cols;
            }
            if (cols.tiles == 1) break;
        }
        if (rows.tiles == 1) break;
    }
    if (best == 0) return false;
    plan.groups = int((p.channels + kLanes - 1) / kLanes);
    plan.bins = plan.cols.size.points() / 2 + 1;
    plan.images = p.batch;
    plan.tiles = plan.rows.tiles * plan.cols.tiles;
    plan.reversed = !transposed;
    plan.scale = float(0.25 / (double(plan.rows.size.points()) * plan.cols.size.points()));
    plan.plane_rows = (most(most(plan.rows.window, plan.rows.step), plan.rows.taps) + 1) | 1;  // one behind the data
    choose_groups(plan, p);
    return true;
}

}  // namespace RK_ISA::spectral

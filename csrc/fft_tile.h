// Two-dimensional transforms of one tile of one channel group, through a plane of half spectra.
//
// A plane holds [row][bin 0 ... width / 2] complex elements. Rows enter two at a time as one complex row; the
// columns are transformed bin by bin and come back as rows.
#pragma once

#include "fft_inner.h"
#include "fft_plan.h"
#include "pack.h"

namespace RK_ISA::spectral {

struct Plane {
    float* data;
    ptrdiff_t pitch;  // floats from one bin to the next

    float* row(int64_t r) const { return data + r * kComplex; }
    Elements column(int bin) const {
        float* top = data + bin * pitch;
        return {top, top + kLanes, kComplex};
    }
};

// Working memory of one thread.
struct Workspace {
    Plane plane, other_plane;
    float *spectrum, *lines, *scratch, *other_scratch;
};

static RK_INLINE bool lanes_in_memory(const Image& image) {
    return image.c == 1 && image.channels == kLanes && image.dtype == RK_F32;
}

static RK_INLINE float* pixel(const Image& image, int64_t row, int64_t col) {
    return reinterpret_cast<float*>(image.data) + row * image.h + col * image.w;
}

// Transforms the rows of a window of an image whose top left is (row, col), and returns how many rows of the plane
// are not known to be zero.
static int window_rows(const Transform& t, const Image& image, int64_t row, int64_t col, int64_t rows, int64_t cols,
                       Plane plane, const Workspace& work) {
    const int64_t first = most(0, -row), last = least(rows, image.rows - row), count = least(cols, image.cols - col);
    if (first >= last || count <= 0) return 0;
    for (int bin = 0; bin <= t.size() / 2; bin++) clear(plane.column(bin).re, 2 * first);
    const bool direct = lanes_in_memory(image) && col >= 0;
    for (int64_t r = first; r < last; r += 2) {
        const int64_t second = least(r + 1, last - 1);  // an odd last row is its own partner
        Elements in;
        if (direct) {
            in = {pixel(image, row + r, col), pixel(image, row + second, col), image.w};
        } else {
            read_tile(image, row + r, col, second - r + 1, count, work.lines, count * kLanes);
            in = {work.lines, work.lines + (second - r) * count * kLanes, kLanes};
        }
        forward_outer(t, in, int(count), work.scratch);
        kInner.untangle[t.inner](work.scratch, t.outer, plane.row(r), plane.pitch, (second - r) * kComplex);
    }
    return int(last);
}

// Reads the taps of a group that matter, dilated, as [taps][taps][kLanes].
static void read_kernel(const Plan& plan, const Image& weight, float* buffer, float* line) {
    const Axis &rows = plan.rows, &cols = plan.cols;
    if (rows.dilation == 1 && cols.dilation == 1) {
        read_tile(weight, rows.first_tap, cols.first_tap, rows.taps, cols.taps, buffer, cols.taps * kLanes);
        return;
    }
    clear(buffer, rows.taps * cols.taps);
    for (int64_t kh = 0; kh < weight.rows; kh++)
        for (int64_t kw = 0; kw < weight.cols; kw++) {
            const int64_t row = kh * rows.dilation - rows.first_tap, col = kw * cols.dilation - cols.first_tap;
            if (row < 0 || row >= rows.taps || col < 0 || col >= cols.taps) continue;
            read_tile(weight, kh, kw, 1, 1, line, kLanes);
            store(buffer + (row * cols.taps + col) * kLanes, load(line));
        }
}

// Transforms the rows of a kernel read by read_kernel.
static void kernel_rows(const Transform& t, const Plan& plan, float* kernel, Plane plane, const Workspace& work) {
    const int64_t rows = plan.rows.taps, cols = plan.cols.taps;
    for (int64_t r = 0; r < rows; r += 2) {
        const int64_t second = least(r + 1, rows - 1);
        float* a = kernel + (plan.reversed ? (rows - r) * cols - 1 : r * cols) * kLanes;
        float* b = kernel + (plan.reversed ? (rows - second) * cols - 1 : second * cols) * kLanes;
        forward_outer(t, {a, b, plan.reversed ? -kLanes : kLanes}, int(cols), work.scratch);
        kInner.untangle[t.inner](work.scratch, t.outer, plane.row(r), plane.pitch, (second - r) * kComplex);
    }
}

// The inverse: writes `rows` x `cols` pixels of an image at (row, col), times `scale`, plus bias, not below floor.
static void image_rows(const Transform& t, Plane plane, const Image& image, int64_t row, int64_t col, int64_t rows,
                       int64_t cols, float scale, Vec bias, bool relu, const Workspace& work) {
    const bool direct = lanes_in_memory(image);
    const Vec lowest = broadcast(-__builtin_inff());
    const Epilogue finish = {broadcast(scale), direct ? bias : Vec{}, direct && relu ? Vec{} : lowest};
    for (int64_t r = 0; r < rows; r += 2) {
        const int64_t second = least(r + 1, rows - 1);
        Elements out;
        if (direct)
            out = {pixel(image, row + r, col), pixel(image, row + second, col), image.w};
        else
            out = {work.lines, work.lines + (second - r) * cols * kLanes, kLanes};
        kInner.tangle[t.inner](plane.row(r), plane.pitch, (second - r) * kComplex, t.outer, work.scratch);
        inverse_outer(t, work.scratch, int(cols), out, finish);
        if (!direct)
            write_tile(image, row + r, col, second - r + 1, cols, work.lines, cols * kLanes, bias, relu);
    }
}

}  // namespace RK_ISA::spectral

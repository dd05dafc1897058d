// Two-dimensional transforms of one tile of one channel group, through a plane of half spectra.
//
// A plane holds [row][bin 0 ... width / 2] complex elements. Rows enter two at a time as one complex row; the
// columns are transformed bin by bin and come back as rows.
#pragma once

#include "fft_inner.h"
#include "fft_plan.h"
#include "pack_groups.h"

namespace RK_ISA::spectral {

struct Plane {
    float* data;
    ptrdiff_t pitch;  // floats from one bin to the next

    float* at(int bin, int64_t row) const { return data + bin * pitch + row * kComplex; }
    Elements column(int bin, const Offsets& offsets) const {
        return {at(bin, 0), at(bin, 0) + kLanes, offsets.at};
    }
};

// Working memory of one thread: a plane for each group of a block, and one or as many for the other factor.
struct Workspace {
    Plane planes[kMaxBlock], other_planes[kMaxBlock];
    float *kept_inputs, *kept_outputs;  // maps of groups that wait for the others of their line
    float *spectrum, *lines, *scratch, *other_scratch;
};

// Rows [first, last) of the columns of a plane hold data. The forward outer pass reads zeros above them and at `last`.
static void clear_around(Plane plane, int bins, int64_t first, int64_t last) {
    for (int bin = 0; bin < bins; bin++) {
        clear(plane.at(bin, 0), 2 * first);
        clear(plane.at(bin, last), 2);
    }
}

// Two rows of a plane, `r` and the one `second` (1 or 0) after it, and where they are as pixels: side by side, each with a
// zero behind it.
struct RowPair {
    const Plane& plane;
    int64_t r, second;
    float* pixels;
    int64_t pitch;
    const Offsets& offsets;

    Elements elements() const { return {pixels, pixels + second * pitch, offsets.at}; }
};

// From pixels to the plane.
static RK_INLINE void transform_rows(const Transform& t, const RowPair& rows, const Workspace& work) {
    forward_outer(t, rows.elements(), work.scratch);
    kInner.untangle[t.coprime][t.inner](work.scratch, t.outer, rows.plane.at(0, rows.r), rows.plane.pitch,
                                        rows.second * kComplex);
}

// From the plane to pixels, times `scale`; meanwhile fetches what will be written.
static RK_INLINE void restore_rows(const Transform& t, const RowPair& rows, float scale, const Upcoming& upcoming,
                                   const Workspace& work) {
    kInner.tangle[t.coprime][t.inner](rows.plane.at(0, rows.r), rows.plane.pitch, rows.second * kComplex, t.outer, work.scratch);
    inverse_outer(t, work.scratch, rows.elements(), {broadcast(scale), upcoming});
}

// Those of `rows` rows from `row` on that are within an image.
struct RowRange {
    int64_t first, last;
};
static RowRange rows_inside(const Image& image, int64_t row, int64_t rows) {
    const int64_t first = least(most(0, -row), rows);
    return {first, most(first, least(rows, image.rows - row))};
}

// Transforms the rows of a window whose top left is (row, col), of the images of a block of groups, and returns how many
// rows of the planes are not known to be zero.
static int64_t window_rows(const Transform& t, const Image* images, int block, int64_t row, int64_t col, int64_t rows,
                           int64_t cols, const Plane* planes, const Workspace& work) {
    const auto [first, last] = rows_inside(*images, row, rows);
    const int64_t pitch = (cols + 1) * kLanes;
    const Offsets offsets(t, cols, kLanes);
    float* lines[kMaxBlock];
    for (int g = 0; g < block; g++) {
        clear_around(planes[g], t.size() / 2 + 1, first, last);
        lines[g] = work.lines + g * 2 * pitch;
        clear(lines[g] + cols * kLanes, 1);
        clear(lines[g] + pitch + cols * kLanes, 1);
    }
    for (int64_t r = first; r < last; r += 2) {
        const int64_t second = least(r + 1, last - 1) - r;  // an odd last row is its own partner
        read_tiles(images, block, row + r, col, second + 1, cols, lines, pitch);
        for (int g = 0; g < block; g++) transform_rows(t, {planes[g], r, second, lines[g], pitch, offsets}, work);
    }
    return last;
}

// Reads the taps of a group that matter, dilated, as [taps][taps + 1][kLanes]: rows end with a zero.
static void read_kernel(const Plan& plan, const Image& weight, float* buffer, float* line) {
    const Axis &rows = plan.rows, &cols = plan.cols;
    const int64_t pitch = (cols.taps + 1) * kLanes;
    if (rows.dilation == 1 && cols.dilation == 1) {
        read_tile(weight, rows.first_tap, cols.first_tap, rows.taps, cols.taps, buffer, pitch);
        for (int64_t row = 0; row < rows.taps; row++) clear(buffer + row * pitch + cols.taps * kLanes, 1);
        return;
    }
    clear(buffer, rows.taps * (cols.taps + 1));
    for (int64_t kh = 0; kh < weight.rows; kh++)
        for (int64_t kw = 0; kw < weight.cols; kw++) {
            const int64_t row = kh * rows.dilation - rows.first_tap, col = kw * cols.dilation - cols.first_tap;
            if (row < 0 || row >= rows.taps || col < 0 || col >= cols.taps) continue;
            read_tile(weight, kh, kw, 1, 1, line, kLanes);
            store(buffer + row * pitch + col * kLanes, load(line));
        }
}

// Transforms the rows of a kernel read by read_kernel.
static void kernel_rows(const Transform& t, const Plan& plan, float* kernel, Plane plane, const Workspace& work) {
    const int64_t rows = plan.rows.taps, cols = plan.cols.taps, pitch = (cols + 1) * kLanes;
    Offsets offsets(t, cols, kLanes);
    if (plan.reversed) offsets.reverse(t, cols, kLanes);
    clear_around(plane, plan.bins, 0, rows);
    for (int64_t r = 0; r < rows; r += 2) {
        const int64_t second = least(r + 1, rows - 1);
        float* a = kernel + (plan.reversed ? rows - 1 - r : r) * pitch;
        float* b = kernel + (plan.reversed ? rows - 1 - second : second) * pitch;
        forward_outer(t, {a, b, offsets.at}, work.scratch);
        kInner.untangle[t.coprime][t.inner](work.scratch, t.outer, plane.at(0, r), plane.pitch,
                                            (second - r) * kComplex);
    }
}

// Pixels [begin, end) of `row` of an image, in so many groups, and those of the row `second` after it, fetched in so many steps;
// none where that gains nothing.
static Upcoming upcoming_pixels(const Image& image, int64_t groups, int64_t row, int64_t second, int64_t begin, int64_t end,
                                int64_t steps) {
    if (!intel() || image.c != 1 || image.streamed) return {};
    const int64_t size = image.dtype == RK_F32 ? 4 : 2, step = size * image.w;
    const char* const first = image.data + size * row * image.h + step * begin;
    return {first, first + (end - begin) * step, step, size * second * image.h, size * groups * kLanes, (end - begin) / steps + 1};
}

// The inverse: writes `rows` x `cols` pixels of the images at (row, col), times `scale`, plus bias, clamped at zero when
// `relu`. `bias` may be NULL.
static void image_rows(const Transform& t, const Plane* planes, const Image* images, int block, int64_t row,
                       int64_t col, int64_t rows, int64_t cols, float scale, const float* bias, bool relu,
                       const Workspace& work) {
    const int64_t pitch = (cols + 1) * kLanes;
    const Offsets offsets(t, cols, kLanes);
    float* lines[kMaxBlock];
    for (int g = 0; g < block; g++) lines[g] = work.lines + g * 2 * pitch;
    for (int64_t r = 0; r < rows; r += 2) {
        const int64_t second = least(r + 1, rows - 1) - r;
        for (int g = 0; g < block; g++) {
            const Upcoming upcoming = upcoming_pixels(*images, block, row + r, second, col + cols * g / block,
                                                  col + cols * (g + 1) / block, t.inner);
            restore_rows(t, {planes[g], r, second, lines[g], pitch, offsets}, scale, upcoming, work);
        }
        write_tiles(images, block, row + r, col, second + 1, cols, lines, pitch, bias, relu);
    }
}

}  // namespace RK_ISA::spectral

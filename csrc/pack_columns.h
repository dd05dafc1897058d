// Moves whole rows of pixels between tensors whose columns are adjacent (NCHW) and lane-interleaved buffers, see pack.h:
// through transposes in registers, of as many columns at a time as are fast.
//
// Rows that follow each other without a gap are one run. A buffer that has gaps needs a cursor over its pixels.
#pragma once

#include "image.h"

namespace RK_ISA {

// Walks the pixels of a tile row by row.
struct Cursor {
    float* start;
    int64_t cols, pitch, col = 0;
    float* pixel = start;

    Cursor(float* start, int64_t cols, int64_t pitch) : start(start), cols(cols), pitch(pitch) {}

    void seek(int64_t index) {
        col = index % cols;
        pixel = start + index / cols * pitch + col * kLanes;
    }

    RK_INLINE float* next() {
        float* current = pixel;
        pixel += kLanes;
        if (++col == cols) {
            col = 0;
            pixel += pitch - cols * kLanes;
        }
        return current;
    }
};

// Columns that follow each other without a gap: all rows as one run, or each by itself.
struct Runs {
    int64_t count, length;
};
static RK_INLINE Runs runs(const Inside& in, bool gapless) {
    return gapless ? Runs{1, in.rows * in.cols} : Runs{in.rows, in.cols};
}
static RK_INLINE Runs runs_of_image(const Image& image, const Inside& in) { return runs(in, image.h == in.cols); }
static RK_INLINE Runs runs_of_both(const Image& image, const Inside& in, int64_t pitch) {
    return runs(in, image.h == in.cols && pitch == in.cols * kLanes);
}

// 4 columns of a group as 4 pixels; absent channels as zeros.
template <bool kAll, class T>
static RK_INLINE void read_quads(const Image& image, const T* source, int count, Vec* pixels) {
    const int64_t stride = image.c;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        Quad q[kQuads];
#pragma GCC unroll 4
        for (int k = 0; k < kQuads; k++) {
            const int channel = 4 * k + j;
            q[k] = kAll || channel < image.channels ? load_quad(source + channel * stride, kAll ? 4 : count) : Quad{};
        }
        pixels[j] = join(q);
    }
    transpose(pixels);
}

// The last block of a run of columns overlaps the one before it rather than being narrower, where it can.
template <int kColumns>
static RK_INLINE int64_t block_start(int64_t i, int64_t length) {
    return length < kColumns || i + kColumns <= length ? i : length - kColumns;
}

// kColumns columns of a whole group as pixels.
template <int kColumns, class T>
static RK_INLINE void read_block(const Image& image, const T* source, Vec* pixels) {
    if constexpr (kColumns == 4) {
        read_quads<true>(image, source, 4, pixels);
    } else {
#pragma GCC unroll 16
        for (int channel = 0; channel < kLanes; channel++) pixels[channel] = load(source + channel * image.c);
        transpose_all(pixels);
    }
}

// Whether a whole group is moved kLanes columns at a time: numbers of 16 bits, which are converted as vectors. Of
// float32, four columns are faster: few straddle cache lines.
template <class T>
static RK_INLINE bool by_vectors(const Image& image, const Inside& in) {
    return sizeof(T) == 2 && image.channels == kLanes && runs_of_image(image, in).length >= kLanes;
}

template <int kColumns, class T>
static void read_merged(const Image image, const T* source, const Inside in, float* target, int64_t pitch) {
    const auto [runs, length] = runs_of_image(image, in);
    const int count = length < kColumns ? int(length) : kColumns;
    const bool all = kColumns > 4 || (count == 4 && image.channels == kLanes);
    Cursor cursor(target, in.cols, pitch);
    for (int64_t run = 0; run < runs; run++) {
        const T* s = source + run * image.h;
        for (int64_t i = 0; i < length; i += kColumns) {
            const int64_t start = block_start<kColumns>(i, length);
            if (start != i) cursor.seek(run * length + start);
            Vec pixels[kColumns];
            if (all)
                read_block<kColumns>(image, s + start, pixels);
            else
                read_quads<false>(image, s + start, count, pixels);
#pragma GCC unroll 16
            for (int j = 0; j < kColumns; j++)
                if (j < count) store(cursor.next(), pixels[j]);
        }
    }
}

template <class T>
static void read_runs(const Image image, const T* source, const Runs runs, float* target, int64_t pitch) {
    for (int64_t run = 0; run < runs.count; run++, source += image.h, target += pitch)
        for (int64_t i = 0; i < runs.length; i += 4) {
            const int64_t start = block_start<4>(i, runs.length);
            Vec pixels[4];
            read_block<4>(image, source + start, pixels);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) store(target + (start + j) * kLanes, pixels[j]);
        }
}

template <class T>
static void read_columns_adjacent(const Image& image, const T* source, const Inside& in, float* target,
                                  int64_t pitch) {
    if (by_vectors<T>(image, in)) return read_merged<kLanes>(image, source, in, target, pitch);
    const Runs runs = runs_of_both(image, in, pitch);
    if (image.channels == kLanes && runs.length >= 4) return read_runs(image, source, runs, target, pitch);
    read_merged<4>(image, source, in, target, pitch);
}

template <bool kAll, class T>
static RK_INLINE void write_quads(const Image& image, T* target, int count, Vec* pixels) {
    const int64_t stride = image.c;
    transpose(pixels);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
        for (int k = 0; k < kQuads; k++) {
            const int channel = 4 * k + j;
            if (kAll || channel < image.channels)
                store_quad(target + channel * stride, quad_of(pixels[j], k), kAll ? 4 : count);
        }
}

// kColumns pixels of a whole group as columns.
template <int kColumns, class T>
static RK_INLINE void write_block(const Image& image, T* target, Vec* pixels) {
    if constexpr (kColumns == 4) {
        write_quads<true>(image, target, 4, pixels);
    } else {
        transpose_all(pixels);
#pragma GCC unroll 16
        for (int channel = 0; channel < kLanes; channel++) store(target + channel * image.c, pixels[channel]);
    }
}

template <int kColumns, class T>
static void write_merged(const Image image, T* target, const Inside in, const float* source, int64_t pitch, Vec bias,
                         bool relu) {
    const auto [runs, length] = runs_of_image(image, in);
    const int count = length < kColumns ? int(length) : kColumns;
    const bool all = kColumns > 4 || (count == 4 && image.channels == kLanes);
    Cursor cursor(const_cast<float*>(source), in.cols, pitch);
    for (int64_t run = 0; run < runs; run++) {
        T* t = target + run * image.h;
        for (int64_t i = 0; i < length; i += kColumns) {
            const int64_t start = block_start<kColumns>(i, length);
            if (start != i) cursor.seek(run * length + start);
            Vec pixels[kColumns] = {};
#pragma GCC unroll 16
            for (int j = 0; j < kColumns; j++)
                if (j < count) pixels[j] = finish(load(cursor.next()), bias, relu);
            if (all)
                write_block<kColumns>(image, t + start, pixels);
            else
                write_quads<false>(image, t + start, count, pixels);
        }
    }
}

template <class T>
static void write_runs(const Image image, T* target, const Runs runs, const float* source, int64_t pitch, Vec bias,
                       bool relu) {
    for (int64_t run = 0; run < runs.count; run++, target += image.h, source += pitch)
        for (int64_t i = 0; i < runs.length; i += 4) {
            const int64_t start = block_start<4>(i, runs.length);
            Vec pixels[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) pixels[j] = finish(load(source + (start + j) * kLanes), bias, relu);
            write_block<4>(image, target + start, pixels);
        }
}

template <class T>
static void write_columns_adjacent(const Image& image, T* target, const Inside& in, const float* source,
                                   int64_t pitch, Vec bias, bool relu) {
    if (by_vectors<T>(image, in)) return write_merged<kLanes>(image, target, in, source, pitch, bias, relu);
    const Runs runs = runs_of_both(image, in, pitch);
    if (image.channels == kLanes && runs.length >= 4) return write_runs(image, target, runs, source, pitch, bias, relu);
    write_merged<4>(image, target, in, source, pitch, bias, relu);
}

}  // namespace RK_ISA

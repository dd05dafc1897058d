// Moves tiles of neighbouring groups between a tensor and lane-interleaved float32 buffers, see pack.h: that of each group to
// or from a buffer of its own.
//
// Where channels are adjacent, the groups of a pixel are moved together: memory delivers a few lines that follow each other
// twice as fast as one line of every pixel, and lines that several groups share are met once.
#pragma once

#include "pack.h"

namespace RK_ISA {

// Calls move(Index<number of groups>, the first of them) for all groups: of a constant number, buffers and bias stay in
// registers.
template <class F>
static RK_INLINE void move_together(int64_t groups, F move) {
    int64_t first = 0;
    for (; first + 4 <= groups; first += 4) move(Index<4>{}, first);
    if (first + 2 <= groups) {
        move(Index<2>{}, first);
        first += 2;
    }
    if (first < groups) move(Index<1>{}, first);
}

// Some pixels of G groups from `first` on, `step` elements apart; in the buffers from `at` on.
template <int G, class T>
static RK_INLINE void read_groups(const T* pixel, int64_t step, int64_t cols, float* const* buffers, int64_t first, int64_t at) {
    float* target[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) target[g] = buffers[first + g] + at;
    pixel += first * kLanes;
    for (int64_t c = 0; c < cols; c++, pixel += step)
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) store(target[g] + c * kLanes, load(pixel + g * kLanes));
}

template <int G, bool Streamed, class T>
static RK_INLINE void write_groups(T* pixel, int64_t step, int64_t cols, float* const* buffers, int64_t first, int64_t at,
                                   const float* bias, bool relu) {
    const float* source[G];
    Vec added[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
        source[g] = buffers[first + g] + at;
        added[g] = bias ? load(bias + (first + g) * kLanes) : Vec{};
    }
    pixel += first * kLanes;
    for (int64_t c = 0; c < cols; c++, pixel += step)
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            const Vec v = finish(load(source[g] + c * kLanes), added[g], relu);
            if constexpr (Streamed)
                stream(pixel + g * kLanes, v);
            else
                store(pixel + g * kLanes, v);
        }
}

template <class T>
static void read_pixels(const Image& first, int64_t groups, int64_t row, int64_t col, const Inside& in, float* const* buffers,
                        int64_t pitch) {
    const T* line = reinterpret_cast<const T*>(first.data) + (row + in.top) * first.h + (col + in.left) * first.w;
    const int64_t rows = in.rows, cols = in.cols, next_line = first.h, step = first.w;
    int64_t at = in.top * pitch + in.left * kLanes;
    for (int64_t r = 0; r < rows; r++, line += next_line, at += pitch) {
        move_together(groups, [&](auto count, int64_t group) {
            read_groups<count>(line, step, cols, buffers, group, at);
        });
    }
}

template <class T, bool Streamed = false>
static void write_pixels(const Image& first, int64_t groups, int64_t row, int64_t col, const Inside& in,
                         float* const* buffers, int64_t pitch, const float* bias, bool relu) {
    T* line = reinterpret_cast<T*>(first.data) + (row + in.top) * first.h + (col + in.left) * first.w;
    const int64_t rows = in.rows, cols = in.cols, next_line = first.h, step = first.w;
    const float* const added = bias ? bias + first.first_channel : nullptr;
    int64_t at = in.top * pitch + in.left * kLanes;
    for (int64_t r = 0; r < rows; r++, line += next_line, at += pitch) {
        move_together(groups, [&](auto count, int64_t group) {
            write_groups<count, Streamed>(line, step, cols, buffers, group, at, added, relu);
        });
    }
}

// How many of the groups can be moved pixel by pixel: not the last one if it has less channels than lanes.
static int64_t whole_groups(const Image* images, int64_t groups) {
    if (groups < 2 || images[0].c != 1) return 0;
    return images[groups - 1].channels == kLanes ? groups : groups - 1;
}

// Reads rows x cols pixels whose top left pixel is (row, col) of each image; zeros where the image has none.
static void read_tiles(const Image* images, int64_t groups, int64_t row, int64_t col, int64_t rows, int64_t cols,
                       float* const* buffers, int64_t pitch) {
    const Image& first = images[0];
    const int64_t whole = whole_groups(images, groups);
    for (int64_t g = whole; g < groups; g++) read_tile(images[g], row, col, rows, cols, buffers[g], pitch);
    if (whole == 0) return;
    const Inside in = clip(first, row, col, rows, cols);
    for (int64_t g = 0; g < whole; g++) clear_outside(in, rows, cols, buffers[g], pitch);
    if (first.dtype == RK_F32)
        read_pixels<float>(first, whole, row, col, in, buffers, pitch);
    else if (first.dtype == RK_BF16)
        read_pixels<BFloat16>(first, whole, row, col, in, buffers, pitch);
    else
        read_pixels<Float16>(first, whole, row, col, in, buffers, pitch);
}

// Writes buffers + bias, clamped at zero when `relu`, to the pixels of the images whose top left is (row, col). `bias`
// may be NULL.
static void write_tiles(const Image* images, int64_t groups, int64_t row, int64_t col, int64_t rows, int64_t cols,
                        float* const* buffers, int64_t pitch, const float* bias, bool relu) {
    const Image& first = images[0];
    const int64_t whole = whole_groups(images, groups);
    for (int64_t g = whole; g < groups; g++)
        write_tile(images[g], row, col, rows, cols, buffers[g], pitch, load_channels(bias, images[g]), relu);
    if (whole == 0) return;
    const Inside in = clip(first, row, col, rows, cols);
    if (first.streamed)
        write_pixels<float, true>(first, whole, row, col, in, buffers, pitch, bias, relu);
    else if (first.dtype == RK_F32)
        write_pixels<float>(first, whole, row, col, in, buffers, pitch, bias, relu);
    else if (first.dtype == RK_BF16)
        write_pixels<BFloat16>(first, whole, row, col, in, buffers, pitch, bias, relu);
    else
        write_pixels<Float16>(first, whole, row, col, in, buffers, pitch, bias, relu);
}

}  // namespace RK_ISA

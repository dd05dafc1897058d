// Moves tiles between tensors of any strides and lane-interleaved float32 buffers.
//
// A buffer holds one group of up to kLanes channels of one image as [rows][cols][kLanes]; pixel (r, c) of a
// tile is at `buffer + r * pitch + c * kLanes`, aligned to one vector, lanes past the group's channels are 0.
//
//   Image image = group_image(tensor, stride, rows, cols, channels, dtype, n, group);
//   read_tile(image, row, col, rows, cols, buffer, pitch);               zeros outside the image
//   write_tile(image, row, col, rows, cols, buffer, pitch, bias, relu);  nothing outside the image
//   load_channels(bias, image)                                           per-channel values as lanes
//
// Three ways by strides: channels adjacent (NHWC) as vector copies, columns adjacent (NCHW) through transposes
// in registers (pack_columns.h), anything else element by element. Nothing outside the tensor is read or written.
//
// The loops over pixels have copies of what describes the image, lest it be read again after each store.
#pragma once

#include "pack_columns.h"

namespace RK_ISA {

static void clear(float* buffer, int64_t pixels) {
    for (int64_t i = 0; i < pixels; i++) store(buffer + i * kLanes, Vec{});
}

template <class T>
static void read_channels_adjacent(const Image image, const T* source, const Inside in, float* target,
                                   int64_t pitch) {
    for (int64_t r = 0; r < in.rows; r++) {
        const T* s = source + r * image.h;
        float* t = target + r * pitch;
        if (image.channels == kLanes)
            for (int64_t c = 0; c < in.cols; c++) store(t + c * kLanes, load(s + c * image.w));
        else
            for (int64_t c = 0; c < in.cols; c++) store(t + c * kLanes, load_some(s + c * image.w, image.channels));
    }
}

template <class T>
static void read_scattered(const Image image, const T* source, const Inside in, float* target, int64_t pitch) {
    for (int64_t r = 0; r < in.rows; r++)
        for (int64_t c = 0; c < in.cols; c++) {
            T lanes[kLanes] = {};
            for (int lane = 0; lane < image.channels; lane++)
                lanes[lane] = source[r * image.h + c * image.w + lane * image.c];
            store(target + r * pitch + c * kLanes, load(lanes));
        }
}

template <class T>
static void read_inside(const Image& image, int64_t row, int64_t col, const Inside& in, float* target,
                        int64_t pitch) {
    const T* source = reinterpret_cast<const T*>(image.data) + (row + in.top) * image.h + (col + in.left) * image.w;
    if (image.c == 1)
        read_channels_adjacent(image, source, in, target, pitch);
    else if (image.w == 1)
        read_columns_adjacent(image, source, in, target, pitch);
    else
        read_scattered(image, source, in, target, pitch);
}

// Clears what of a tile lies outside its image.
static void clear_outside(const Inside& in, int64_t rows, int64_t cols, float* buffer, int64_t pitch) {
    if (in.rows == rows && in.cols == cols) return;
    for (int64_t r = 0; r < rows; r++) {
        float* line = buffer + r * pitch;
        if (r < in.top || r >= in.top + in.rows) {
            clear(line, cols);
        } else {
            clear(line, in.left);
            clear(line + (in.left + in.cols) * kLanes, cols - in.left - in.cols);
        }
    }
}

// Reads rows x cols pixels whose top left pixel is (row, col) of the image; zeros where the image has none.
static void read_tile(const Image& image, int64_t row, int64_t col, int64_t rows, int64_t cols, float* buffer,
                      int64_t pitch) {
    const Inside in = clip(image, row, col, rows, cols);
    clear_outside(in, rows, cols, buffer, pitch);
    if (!in.rows) return;
    float* target = buffer + in.top * pitch + in.left * kLanes;
    if (image.dtype == RK_F32)
        read_inside<float>(image, row, col, in, target, pitch);
    else if (image.dtype == RK_BF16)
        read_inside<BFloat16>(image, row, col, in, target, pitch);
    else
        read_inside<Float16>(image, row, col, in, target, pitch);
}

template <class T>
static void write_channels_adjacent(const Image image, T* target, const Inside in, const float* source,
                                    int64_t pitch, Vec bias, bool relu) {
    for (int64_t r = 0; r < in.rows; r++) {
        T* t = target + r * image.h;
        const float* s = source + r * pitch;
        if (image.channels == kLanes)
            for (int64_t c = 0; c < in.cols; c++) store(t + c * image.w, finish(load(s + c * kLanes), bias, relu));
        else
            for (int64_t c = 0; c < in.cols; c++)
                store_some(t + c * image.w, finish(load(s + c * kLanes), bias, relu), image.channels);
    }
}

template <class T>
static void write_scattered(const Image image, T* target, const Inside in, const float* source, int64_t pitch,
                            Vec bias, bool relu) {
    for (int64_t r = 0; r < in.rows; r++)
        for (int64_t c = 0; c < in.cols; c++) {
            T lanes[kLanes];
            store(lanes, finish(load(source + r * pitch + c * kLanes), bias, relu));
            for (int lane = 0; lane < image.channels; lane++)
                target[r * image.h + c * image.w + lane * image.c] = lanes[lane];
        }
}

template <class T>
static void write_inside(const Image& image, int64_t row, int64_t col, const Inside& in, const float* source,
                         int64_t pitch, Vec bias, bool relu) {
    T* target = reinterpret_cast<T*>(image.data) + (row + in.top) * image.h + (col + in.left) * image.w;
    if (image.c == 1)
        write_channels_adjacent(image, target, in, source, pitch, bias, relu);
    else if (image.w == 1)
        write_columns_adjacent(image, target, in, source, pitch, bias, relu);
    else
        write_scattered(image, target, in, source, pitch, bias, relu);
}

// Writes buffer + bias, clamped at zero when `relu`, to the pixels of the image whose top left is (row, col).
static void write_tile(const Image& image, int64_t row, int64_t col, int64_t rows, int64_t cols,
                       const float* buffer, int64_t pitch, Vec bias, bool relu) {
    const Inside in = clip(image, row, col, rows, cols);
    if (!in.rows) return;
    const float* source = buffer + in.top * pitch + in.left * kLanes;
    if (image.dtype == RK_F32)
        write_inside<float>(image, row, col, in, source, pitch, bias, relu);
    else if (image.dtype == RK_BF16)
        write_inside<BFloat16>(image, row, col, in, source, pitch, bias, relu);
    else
        write_inside<Float16>(image, row, col, in, source, pitch, bias, relu);
}

}  // namespace RK_ISA

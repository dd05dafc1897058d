// Moves whole maps of neighbouring groups between a tensor and lane-interleaved float32 buffers, see pack.h: maps
// `map` floats apart, rows without gaps.
//
// Where channels are adjacent, the groups of a pixel are moved together: memory delivers a few lines that follow each other
// twice as fast as one line of every pixel.
#pragma once

#include "pack.h"

namespace RK_ISA {

template <class T>
static void read_pixels(const Image& first, int64_t groups, float* maps, int64_t map) {
    for (int64_t r = 0; r < first.rows; r++)
        for (int64_t c = 0; c < first.cols; c++, maps += kLanes) {
            const T* const pixel = reinterpret_cast<const T*>(first.data) + r * first.h + c * first.w;
            for (int64_t g = 0; g < groups; g++) store(maps + g * map, load(pixel + g * kLanes));
        }
}

template <class T>
static void write_pixels(const Image& first, int64_t groups, const float* maps, int64_t map, const float* bias, bool relu) {
    for (int64_t r = 0; r < first.rows; r++)
        for (int64_t c = 0; c < first.cols; c++, maps += kLanes) {
            T* const pixel = reinterpret_cast<T*>(first.data) + r * first.h + c * first.w;
            for (int64_t g = 0; g < groups; g++) {
                const Vec added = bias ? load(bias + first.first_channel + g * kLanes) : Vec{};
                store(pixel + g * kLanes, finish(load(maps + g * map), added, relu));
            }
        }
}

// How many of the groups can be moved pixel by pixel: not the last one if it has less channels than lanes.
static int64_t whole_groups(const Image* images, int64_t groups) {
    if (images[0].c != 1) return 0;
    return images[groups - 1].channels == kLanes ? groups : groups - 1;
}

static void read_maps(const Image* images, int64_t groups, float* maps, int64_t map) {
    const Image& first = images[0];
    const int64_t whole = whole_groups(images, groups);
    if (first.dtype == RK_F32)
        read_pixels<float>(first, whole, maps, map);
    else if (first.dtype == RK_BF16)
        read_pixels<BFloat16>(first, whole, maps, map);
    else
        read_pixels<Float16>(first, whole, maps, map);
    for (int64_t g = whole; g < groups; g++)
        read_tile(images[g], 0, 0, first.rows, first.cols, maps + g * map, first.cols * kLanes);
}

// Writes the maps + bias, clamped at zero when `relu`. `bias` may be NULL.
static void write_maps(const Image* images, int64_t groups, const float* maps, int64_t map, const float* bias, bool relu) {
    const Image& first = images[0];
    const int64_t whole = whole_groups(images, groups);
    if (first.dtype == RK_F32)
        write_pixels<float>(first, whole, maps, map, bias, relu);
    else if (first.dtype == RK_BF16)
        write_pixels<BFloat16>(first, whole, maps, map, bias, relu);
    else
        write_pixels<Float16>(first, whole, maps, map, bias, relu);
    for (int64_t g = whole; g < groups; g++)
        write_tile(images[g], 0, 0, first.rows, first.cols, maps + g * map, first.cols * kLanes,
                   load_channels(bias, images[g]), relu);
}

}  // namespace RK_ISA

// One image of a tensor, restricted to the channels of one group; parts of it.
#pragma once

#include "element.h"
#include "replknet_core.h"

namespace RK_ISA {

// One image of a tensor, restricted to the channels of one group. Strides are in elements.
struct Image {
    char* data;  // pixel (0, 0) of the group's first channel
    int64_t c, h, w;
    int64_t rows, cols;
    int64_t first_channel;
    int channels;  // of the group, 1 .. kLanes
    int dtype;
    bool streamed = false;  // is written past the caches
};

static inline int64_t group_count(int64_t channels) { return (channels + kLanes - 1) / kLanes; }

static Image group_image(void* tensor, const int64_t stride[4], int64_t rows, int64_t cols, int64_t channels,
                         int dtype, int64_t n, int64_t group) {
    const int64_t first = group * kLanes, rest = channels - first;
    const int64_t size = dtype == RK_F32 ? 4 : 2;
    return {static_cast<char*>(tensor) + size * (n * stride[0] + first * stride[1]),
            stride[1], stride[2], stride[3], rows, cols, first, rest < kLanes ? int(rest) : kLanes, dtype};
}

// The filters of a group as an image, one "pixel" for each tap.
static Image filter_image(const rk_problem& p, const float* weight, int64_t group) {
    const int64_t taps = int64_t(p.kernel_h) * p.kernel_w, first = group * kLanes, lane = first % RK_FILTER_LANES;
    const int64_t stride[4] = {0, taps, p.kernel_w, 1};
    Image image = group_image(const_cast<float*>(weight), stride, p.kernel_h, p.kernel_w, p.channels, RK_F32, 0, group);
    if (p.packed_weight) {
        image.data = reinterpret_cast<char*>(const_cast<float*>(weight) + (first - lane) * taps + lane);
        image.c = 1;
        image.w = RK_FILTER_LANES;
        image.h = p.kernel_w * image.w;
    }
    return image;
}

// The group's part of a vector with one value for each channel, or zeros where there is none.
static RK_INLINE Vec load_channels(const float* values, const Image& image) {
    return values ? load_some(values + image.first_channel, image.channels) : Vec{};
}

// The part of a tile that lies inside its image.
struct Inside {
    int64_t top, left, rows, cols;  // position within the tile, and size
};

static Inside clip(const Image& image, int64_t row, int64_t col, int64_t rows, int64_t cols) {
    const int64_t top = row < 0 ? -row : 0, left = col < 0 ? -col : 0;
    const int64_t bottom = rows < image.rows - row ? rows : image.rows - row;
    const int64_t right = cols < image.cols - col ? cols : image.cols - col;
    return {top, left, bottom > top && right > left ? bottom - top : 0, right > left ? right - left : 0};
}

// The sums of a pixel on their way to the image.
static RK_INLINE Vec finish(Vec v, Vec bias, bool relu) {
    v += bias;
    return relu ? max_with_zero(v) : v;
}

}  // namespace RK_ISA

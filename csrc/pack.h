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
// in registers, anything else element by element. Nothing outside the tensor is read or written.
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

static void clear(float* buffer, int64_t pixels) {
    for (int64_t i = 0; i < pixels; i++) store(buffer + i * kLanes, Vec{});
}

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

template <class T>
static void read_channels_adjacent(const Image& image, const T* source, const Inside& in, float* target,
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

// Rows that follow each other without a gap are read as one.
static RK_INLINE void merge_rows(const Image& image, const Inside& in, int64_t* runs, int64_t* length) {
    const bool gapless = image.h == in.cols;
    *runs = gapless ? 1 : in.rows;
    *length = gapless ? in.rows * in.cols : in.cols;
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
    int64_t runs, length;
    merge_rows(image, in, &runs, &length);
    return sizeof(T) == 2 && image.channels == kLanes && length >= kLanes;
}

template <int kColumns, class T>
static void read_merged(const Image& image, const T* source, const Inside& in, float* target, int64_t pitch) {
    int64_t runs, length;
    merge_rows(image, in, &runs, &length);
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

// Runs of at least 4 columns on which neither side has gaps: all rows as one, or each by itself.
struct Runs {
    int64_t count, length;

    Runs(const Image& image, const Inside& in, int64_t pitch) {
        const bool gapless = image.h == in.cols && pitch == in.cols * kLanes;
        count = gapless ? 1 : in.rows;
        length = gapless ? in.rows * in.cols : in.cols;
    }
    bool suit(const Image& image) const { return image.channels == kLanes && length >= 4; }
};

template <class T>
static void read_runs(const Image& image, const T* source, const Runs& runs, float* target, int64_t pitch) {
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
    const Runs runs(image, in, pitch);
    if (runs.suit(image)) return read_runs(image, source, runs, target, pitch);
    read_merged<4>(image, source, in, target, pitch);
}

template <class T>
static void read_scattered(const Image& image, const T* source, const Inside& in, float* target, int64_t pitch) {
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

// Reads rows x cols pixels whose top left pixel is (row, col) of the image; zeros where the image has none.
static void read_tile(const Image& image, int64_t row, int64_t col, int64_t rows, int64_t cols, float* buffer,
                      int64_t pitch) {
    const Inside in = clip(image, row, col, rows, cols);
    for (int64_t r = 0; r < rows; r++) {
        float* line = buffer + r * pitch;
        if (r < in.top || r >= in.top + in.rows) {
            clear(line, cols);
        } else {
            clear(line, in.left);
            clear(line + (in.left + in.cols) * kLanes, cols - in.left - in.cols);
        }
    }
    if (!in.rows) return;
    float* target = buffer + in.top * pitch + in.left * kLanes;
    if (image.dtype == RK_F32)
        read_inside<float>(image, row, col, in, target, pitch);
    else if (image.dtype == RK_BF16)
        read_inside<BFloat16>(image, row, col, in, target, pitch);
    else
        read_inside<Float16>(image, row, col, in, target, pitch);
}

static RK_INLINE Vec finish(Vec v, Vec bias, bool relu) {
    v += bias;
    return relu ? max_with_zero(v) : v;
}

template <class T>
static void write_channels_adjacent(const Image& image, T* target, const Inside& in, const float* source,
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
static void write_merged(const Image& image, T* target, const Inside& in, const float* source, int64_t pitch, Vec bias,
                         bool relu) {
    int64_t runs, length;
    merge_rows(image, in, &runs, &length);
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
static void write_runs(const Image& image, T* target, const Runs& runs, const float* source, int64_t pitch, Vec bias,
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
    const Runs runs(image, in, pitch);
    if (runs.suit(image)) return write_runs(image, target, runs, source, pitch, bias, relu);
    write_merged<4>(image, target, in, source, pitch, bias, relu);
}

template <class T>
static void write_scattered(const Image& image, T* target, const Inside& in, const float* source, int64_t pitch,
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

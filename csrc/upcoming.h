// Cache lines that will soon be written: fetched a few at a time, between computations that leave memory idle.
#pragma once

#include "image.h"

namespace RK_ISA {

// Intel's cores fetch lines in pairs, and distant ones, such as a group's of every pixel, three times as slowly as lines that
// follow each other.
static bool intel() {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

// The first `bytes` of pixels that are `step` bytes apart, in two rows.
struct Upcoming {
    const char *pixel = nullptr, *end = nullptr;
    int64_t step = 0, next_row = 0, bytes = 0;

    int64_t pixels() const { return step ? (end - pixel) / step : 0; }

    RK_INLINE void fetch(int64_t count) {
        constexpr int kLineBytes = kLine * sizeof(float);
        for (; count > 0 && pixel < end; count--, pixel += step)
            for (int64_t i = 0; i < bytes; i += kLineBytes) {
                __builtin_prefetch(pixel + i, 1);
                __builtin_prefetch(pixel + next_row + i, 1);
            }
    }
};

// Of `cols` pixels of a row and of the one `second` (1 or 0) after it, in `groups` groups of an image, the `part`-th of so many
// parts; none where fetching them gains nothing.
static Upcoming upcoming_pixels(const Image& image, int64_t groups, int64_t row, int64_t col, int64_t second, int64_t cols,
                                int64_t part, int64_t parts) {
    if (!intel() || image.c != 1) return {};
    const int64_t size = image.dtype == RK_F32 ? 4 : 2, step = size * image.w;
    const char* const first = image.data + size * row * image.h + step * col;
    return {first + cols * part / parts * step, first + cols * (part + 1) / parts * step, step, size * second * image.h,
            size * groups * kLanes};
}

}  // namespace RK_ISA

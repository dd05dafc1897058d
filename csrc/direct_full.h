// Forward pass and input gradient of the direct algorithm where every input reaches every output: H x W inputs, as many
// outputs and 2H - 1 x 2W - 1 taps, as of large kernels on the small maps of the last stages.
//
// An even number of rows is halved once: the taps before, around and after the middle, A, B and C, each of H - 1 rows,
// make three products where the definition takes four (Karatsuba),
//   y0 = B (x0 + x1) + (C - B) x1,   y1 = B (x0 + x1) + (A - B) x0   for the halves x0, x1 and y0, y1.
// An infinity then becomes a NaN. Halving again costs as much, in differences of filters, as it saves.
//
// Workspace of one thread: a packed filter, a map, and the factors and two maps of the groups that are read together:
// less than 2 MiB.
#pragma once

#include <omp.h>

#include "direct_plan.h"

namespace RK_ISA {
namespace direct {

constexpr int kMostFull = 32;  // rows or columns; the transform wins before
constexpr int kFewestHalved = 10;
constexpr int64_t kTogether = RK_FILTER_LANES / kLanes;  // groups that share cache lines where channels are adjacent
constexpr int kFullTapsPerSum = 56;

static bool suits_full(const rk_problem& p) {
    return p.pass != RK_GRAD_WEIGHT && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1 &&
           p.in_h == p.out_h && p.in_w == p.out_w && p.in_h <= kMostFull && p.in_w <= kMostFull &&
           p.kernel_h == 2 * p.in_h - 1 && p.kernel_w == 2 * p.in_w - 1 && p.pad_top == p.in_h - 1 &&
           p.pad_left == p.in_w - 1;
}

static bool is_halved(const rk_problem& p) { return p.in_h % 2 == 0 && p.in_h >= kFewestHalved; }

static int64_t map_floats(const rk_problem& p) { return int64_t(p.in_h) * p.in_w * kLanes; }

// The filters of the products: B, C - B, A - B, or the whole one.
static int64_t factors_floats(const rk_problem& p) {
    return is_halved(p) ? 3 * int64_t(p.in_h - 1) * p.kernel_w * kLanes : filter_floats(p);
}

// Taps of a filter in the order of their use, `step` floats apart.
struct Taps {
    const float* first;
    int64_t step;
};

// The factors of `groups` filters that lie side by side, each written to its own `factors_floats`.
static void factorize(const rk_problem& p, Taps taps, int64_t groups, float* factors) {
    const int64_t size = factors_floats(p), line = p.kernel_w * taps.step;
    if (!is_halved(p)) {
        for (int64_t i = 0; i < p.kernel_h * p.kernel_w; i++, taps.first += taps.step, factors += kLanes)
            for (int64_t g = 0; g < groups; g++) store(factors + g * size, load(taps.first + g * kLanes));
        return;
    }
    const int64_t count = int64_t(p.in_h - 1) * p.kernel_w, next = count * kLanes;
    const float *before = taps.first, *around = before + p.in_h / 2 * line, *after = around + p.in_h / 2 * line;
    for (int64_t i = 0; i < count; i++, before += taps.step, around += taps.step, after += taps.step, factors += kLanes)
        for (int64_t g = 0; g < groups; g++) {
            const Vec common = load(around + g * kLanes);
            float* const target = factors + g * size;
            store(target, common);
            store(target + next, load(after + g * kLanes) - common);
            store(target + 2 * next, load(before + g * kLanes) - common);
        }
}

// Writes the factors of some groups' filters; `packed` holds one filter.
static void read_factors(const rk_problem& p, const float* weight, int64_t group, int64_t groups, float* factors,
                         float* packed) {
    if (p.packed_weight) {
        const Image filter = filter_image(p, weight, group);
        return factorize(p, {reinterpret_cast<const float*>(filter.data), filter.w}, groups, factors);
    }
    const int64_t taps = int64_t(p.kernel_h) * p.kernel_w;
    const bool flipped = p.pass == RK_GRAD_INPUT, as_read = !flipped && !is_halved(p);
    for (int64_t g = 0; g < groups; g++, factors += factors_floats(p)) {
        float* const target = as_read ? factors : packed;
        read_tile(filter_image(p, weight, group + g), 0, 0, p.kernel_h, p.kernel_w, target, p.kernel_w * kLanes);
        const Taps used = flipped ? Taps{packed + (taps - 1) * kLanes, -kLanes} : Taps{packed, kLanes};
        if (!as_read) factorize(p, used, 1, factors);
    }
}

// y = start + filter * x on packed maps of `rows` x `cols` pixels; without `start`, zero.
struct Product {
    int rows, cols;
    const float *filter, *x, *start;
    float* y;
};

template <int R, int T>
static RK_INLINE void add_input(const float* x, const float* w, int64_t w_pitch, Vec (&sum)[R][T]) {
    const Vec v = load(x);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sum[r][t] += v * load(w - r * w_pitch - t * kLanes);
}

// Adds rows of x from `begin` to before `end` to R rows and T columns of outputs. Square: x has T columns as well.
template <int R, int T, bool Square>
static void multiply_block(const Product& p, int begin, int end, int row, int col) {
    const int64_t pitch = p.cols * kLanes, w_pitch = 2 * pitch - kLanes;
    Vec sum[R][T] = {};
    const float* x = p.x + begin * pitch;
    const float* w = p.filter + (begin - row + p.rows - 1) * w_pitch + (p.cols - 1 - col) * kLanes;
    for (int i = begin; i < end; i++, x += pitch, w += w_pitch) {
        if constexpr (Square) {
#pragma GCC unroll 16
            for (int j = 0; j < T; j++) add_input(x + j * kLanes, w + j * kLanes, w_pitch, sum);
        } else {
#pragma GCC unroll 1
            for (int j = 0; j < p.cols; j++) add_input(x + j * kLanes, w + j * kLanes, w_pitch, sum);
        }
    }
    const int64_t corner = row * pitch + col * kLanes;
    const float* start = p.start ? p.start + corner : nullptr;
    float* const y = p.y + corner;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            const int64_t at = r * pitch + t * kLanes;
            store(y + at, start ? sum[r][t] + load(start + at) : sum[r][t]);
        }
}

// Rows of outputs at once, for `cols` columns: every tap is loaded anew for each of them, so that more sums would save
// nothing; with 28 of AVX-512 GCC spills half of them.
constexpr int full_rows(int cols) { return 14 / cols < kMaxBlockRows ? 14 / cols : kMaxBlockRows; }

typedef void (*BlockProduct)(const Product&, int begin, int end, int row, int col);

template <int R, int T, bool Square>
static constexpr BlockProduct block_product() {
    if constexpr (R <= full_rows(T))
        return multiply_block<R, T, Square>;
    else
        return nullptr;
}

template <bool Square, class Widths = Indices<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>>
struct BlockProducts;

template <bool Square, int... T>
struct BlockProducts<Square, Indices<T...>> {
    static constexpr BlockProduct table[kMaxBlockRows][kMaxCols] = {
        {block_product<1, T, Square>()...},
        {block_product<2, T, Square>()...},
        {block_product<3, T, Square>()...},
    };
};

static void multiply(Product p) {
    const Split parts(p.rows, larger(1, kFullTapsPerSum / p.cols)), blocks(p.cols, kMaxCols);
    const auto& kernels = blocks.parts == 1 ? BlockProducts<true>::table : BlockProducts<false>::table;
    for (int part = 0; part < parts.parts; part++, p.start = p.y)
        for (int block = 0; block < blocks.parts; block++) {
            const int col = blocks.begin(block), width = blocks.end(block) - col;
            for (int row = 0, count; row < p.rows; row += count) {
                count = smaller(full_rows(width), p.rows - row);
                kernels[count - 1][width - 1](p, parts.begin(part), parts.end(part), row, col);
            }
        }
}

// The whole map; `scratch` holds another one.
static void multiply_map(const rk_problem& p, const float* factors, const float* x, float* y, float* scratch) {
    const int rows = p.in_h, cols = p.in_w, half = rows / 2;
    if (!is_halved(p)) return multiply({rows, cols, factors, x, nullptr, y});
    const int64_t floats = int64_t(half) * cols * kLanes, filter = factors_floats(p) / 3;
    float *const sum = scratch, *const common = scratch + floats;
    for (int64_t i = 0; i < floats; i += kLanes) store(sum + i, load(x + i) + load(x + floats + i));
    multiply({half, cols, factors, sum, nullptr, common});
    multiply({half, cols, factors + filter, x + floats, common, y});
    multiply({half, cols, factors + 2 * filter, x, common, y + floats});
}

static size_t full_workspace(const rk_problem& p) {
    const int64_t floats = kTogether * (factors_floats(p) + 2 * map_floats(p)) + filter_floats(p) + map_floats(p);
    return floats * sizeof(float);
}

// Calls `move(group, row, rows)` for all rows of some groups: row by row where groups share cache lines.
template <class Move>
static RK_INLINE void move_rows(const Image& image, int64_t groups, Move move) {
    const int64_t rows = image.c == 1 ? 1 : image.rows;
    for (int64_t row = 0; row < image.rows; row += rows)
        for (int64_t g = 0; g < groups; g++) move(g, row, rows);
}

static void run_full(const Call& call) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int64_t all = group_count(p.channels), parts = divide_up(all, kTogether), jobs = parts * p.batch;
    const int64_t cols = p.in_w, pitch = cols * kLanes, map = map_floats(p), filter = factors_floats(p);
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float* const factors = reinterpret_cast<float*>(call.workspace + thread * call.workspace_stride);
        float *const packed = factors + kTogether * filter, *const x = packed + filter_floats(p);
        float *const y = x + kTogether * map, *const scratch = y + kTogether * map;
        int64_t read = -1;
        for (int64_t i = jobs * thread / threads; i < jobs * (thread + 1) / threads; i++) {
            const int64_t n = i % p.batch, first = i / p.batch * kTogether, groups = at_most(kTogether, all - first);
            if (read != first) read_factors(p, call.weight, first, groups, factors, packed);
            read = first;
            Image source[kTogether], target[kTogether];
            for (int64_t g = 0; g < groups; g++) {
                const auto image = [&](void* tensor, const int64_t* stride) {
                    return group_image(tensor, stride, p.in_h, cols, p.channels, p.dtype, n, first + g);
                };
                const Image input = image(call.input, p.input_stride), output = image(call.output, p.output_stride);
                source[g] = flipped ? output : input;
                target[g] = flipped ? input : output;
            }
            move_rows(source[0], groups, [&](int64_t g, int64_t row, int64_t rows) {
                read_tile(source[g], row, 0, rows, cols, x + g * map + row * pitch, pitch);
            });
            for (int64_t g = 0; g < groups; g++)
                multiply_map(p, factors + g * filter, x + g * map, y + g * map, scratch);
            move_rows(target[0], groups, [&](int64_t g, int64_t row, int64_t rows) {
                write_tile(target[g], row, 0, rows, cols, y + g * map + row * pitch, pitch,
                           load_channels(call.bias, target[g]), p.relu);
            });
        }
    }
}

}  // namespace direct
}  // namespace RK_ISA

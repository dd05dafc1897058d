// Forward pass and input gradient of the direct algorithm where every input reaches every output: H x W inputs, as many
// outputs and 2H - 1 x 2W - 1 taps, as of large kernels on the small maps of the last stages.
//
// An even number of rows is halved once: the taps before, around and after the middle, A, B and C, each of H - 1 rows,
// make three products where the definition takes four (Karatsuba),
//   y0 = B (x0 + x1) + (C - B) x1,   y1 = B (x0 + x1) + (A - B) x0   for the halves x0, x1 and y0, y1.
// An infinity then becomes a NaN. Halving again costs as much, in differences of filters, as it saves.
//
// Workspace of one thread: a filter, a map, and two maps and the factors of the groups that are read together: less
// than 2 MiB.
#pragma once

#include <omp.h>

#include "direct_plan.h"
#include "pack_groups.h"

namespace RK_ISA {
namespace direct {

constexpr int kMostFull = 32;  // rows or columns; the transform wins before
constexpr int kFewestHalved = 10;
constexpr int64_t kLineGroups = RK_FILTER_LANES / kLanes;  // that share cache lines where channels are adjacent
constexpr int64_t kMostMaps = 16;            // read and written together; more gain nothing
constexpr int64_t kMapsBytes = 256 << 10;    // of them, with factors: half of a small second level cache
constexpr int64_t kFetchedFloats = 4 << 10;  // of the filters of a line; those of 27x27 taps do not gain
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

// The three factors of `groups` filters that lie side by side.
static void factorize(const rk_problem& p, Taps taps, int64_t groups, float* factors) {
    const int64_t size = factors_floats(p), next = size / 3, half = p.in_h / 2 * p.kernel_w * taps.step;
    const float *before = taps.first, *around = before + half, *after = around + half;
    for (int64_t i = 0; i < next; i += kLanes, before += taps.step, around += taps.step, after += taps.step)
        for (int64_t g = 0; g < groups; g++) {
            const Vec common = load(around + g * kLanes);
            float* const target = factors + g * size + i;
            store(target, common);
            store(target + next, load(after + g * kLanes) - common);
            store(target + 2 * next, load(before + g * kLanes) - common);
        }
}

// The factors of some groups' filters: as they lie, or written to `factors`; `whole` holds one filter.
static void find_factors(const rk_problem& p, const float* weight, int64_t group, int64_t groups, float* factors,
                         float* whole, Taps* found) {
    const int64_t size = factors_floats(p);
    for (int64_t g = 0; g < groups; g++) found[g] = {factors + g * size, kLanes};
    if (p.packed_weight) {
        const Image filter = filter_image(p, weight, group);
        const Taps taps = {reinterpret_cast<const float*>(filter.data), filter.w};
        if (is_halved(p)) return factorize(p, taps, groups, factors);
        for (int64_t g = 0; g < groups; g++) found[g] = {taps.first + g * kLanes, taps.step};
        return;
    }
    for (int64_t g = 0; g < groups; g++) {
        read_filter(p, weight, group + g, is_halved(p) ? whole : factors + g * size);
        if (is_halved(p)) factorize(p, {whole, kLanes}, 1, factors + g * size);
    }
}

// Brings the filters of the next line's groups into the second level cache.
static RK_INLINE void fetch_next_filters(const rk_problem& p, const float* weight, int64_t group) {
    const int64_t floats = int64_t(p.kernel_h) * p.kernel_w * RK_FILTER_LANES;
    if (floats > kFetchedFloats || group + kLineGroups >= group_count(p.channels)) return;
    const float* const next = weight + (group / kLineGroups + 1) * floats;
    for (int64_t i = 0; i < floats; i += kLine) __builtin_prefetch(next + i, 0, 2);
}

// y = start + filter * x on packed maps of `rows` x `cols` pixels; without `start`, zero.
struct Product {
    int rows, cols;
    Taps filter;
    const float *x, *start;
    float* y;
};

// GCC keeps taps that two inputs share, and spills sums for them where registers are few.
static RK_INLINE void forget_loads() {
#if RK_LANES == 8
    asm volatile("" ::: "memory");
#endif
}

template <int R, int T, int Step>
static RK_INLINE void add_input(const float* x, const float* w, int64_t w_pitch, Vec (&sum)[R][T]) {
    const Vec v = load(x);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sum[r][t] += v * load(w - r * w_pitch - t * Step);
    forget_loads();
}

// Adds rows of x from `begin` to before `end` to R rows and T columns of outputs, with taps Step floats apart. Square: x
// has T columns as well.
template <int R, int T, bool Square, int Step>
static void multiply_block(const Product& p, int begin, int end, int row, int col) {
    const int cols = Square ? T : p.cols;
    const int64_t pitch = cols * kLanes, w_pitch = (2 * cols - 1) * Step;
    Vec sum[R][T] = {};
    const float* x = p.x + begin * pitch;
    const float* w = p.filter.first + (begin - row + p.rows - 1) * w_pitch + (cols - 1 - col) * Step;
    for (int i = begin; i < end; i++, x += pitch, w += w_pitch) {
        if constexpr (Square) {
#pragma GCC unroll 16
            for (int j = 0; j < T; j++) add_input<R, T, Step>(x + j * kLanes, w + j * Step, w_pitch, sum);
        } else {
#pragma GCC unroll 1
            for (int j = 0; j < cols; j++) add_input<R, T, Step>(x + j * kLanes, w + j * Step, w_pitch, sum);
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

template <int R, int T, bool Square, int Step>
static constexpr BlockProduct block_product() {
    if constexpr (R <= full_rows(T))
        return multiply_block<R, T, Square, Step>;
    else
        return nullptr;
}

template <bool Square, int Step, class Widths = Indices<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>>
struct BlockProducts;

template <bool Square, int Step, int... T>
struct BlockProducts<Square, Step, Indices<T...>> {
    static constexpr BlockProduct table[kMaxBlockRows][kMaxCols] = {
        {block_product<1, T, Square, Step>()...},
        {block_product<2, T, Square, Step>()...},
        {block_product<3, T, Square, Step>()...},
    };
};

template <int Step>
static void multiply_by(Product p) {
    const Split parts(p.rows, larger(1, kFullTapsPerSum / p.cols)), blocks(p.cols, kMaxCols);
    const auto& kernels = blocks.parts == 1 ? BlockProducts<true, Step>::table : BlockProducts<false, Step>::table;
    for (int part = 0; part < parts.parts; part++, p.start = p.y)
        for (int block = 0; block < blocks.parts; block++) {
            const int col = blocks.begin(block), width = blocks.end(block) - col;
            for (int row = 0, count; row < p.rows; row += count) {
                count = smaller(full_rows(width), p.rows - row);
                kernels[count - 1][width - 1](p, parts.begin(part), parts.end(part), row, col);
            }
        }
}

static void multiply(const Product& p) {
    if (p.filter.step == kLanes)
        multiply_by<kLanes>(p);
    else
        multiply_by<RK_FILTER_LANES>(p);
}

// The whole map; `scratch` holds another one.
static void multiply_map(const rk_problem& p, Taps factors, const float* x, float* y, float* scratch) {
    const int rows = p.in_h, cols = p.in_w, half = rows / 2;
    if (!is_halved(p)) return multiply({rows, cols, factors, x, nullptr, y});
    const int64_t floats = map_floats(p) / 2, filter = factors_floats(p) / 3;
    const Taps after = {factors.first + filter, kLanes}, before = {after.first + filter, kLanes};
    float *const sum = scratch, *const common = scratch + floats;
    for (int64_t i = 0; i < floats; i += kLanes) store(sum + i, load(x + i) + load(x + floats + i));
    multiply({half, cols, factors, sum, nullptr, common});
    multiply({half, cols, after, x + floats, common, y});
    multiply({half, cols, before, x, common, y + floats});
}

// Filters whose factors are kept: for other images.
static int64_t kept_filters(const rk_problem& p, int64_t groups) { return p.batch > 1 ? groups : kLineGroups; }

static int64_t floats_together(const rk_problem& p, int64_t groups) {
    return kept_filters(p, groups) * factors_floats(p) + 2 * groups * map_floats(p);
}

// Groups that are read and written together: as many as stay in the cache, if threads then have no more to do.
static int64_t maps_together(const rk_problem& p) {
    const int64_t all = group_count(p.channels), threads = p.threads;
    const auto most_of_a_thread = [&](int64_t groups) { return divide_up(divide_up(all, groups) * p.batch, threads) * groups; };
    int64_t groups = kMostMaps;
    while (groups > kLineGroups && (floats_together(p, groups) * int64_t(sizeof(float)) > kMapsBytes ||
                                    most_of_a_thread(groups) > most_of_a_thread(kLineGroups)))
        groups /= 2;
    return groups;
}

static size_t full_workspace(const rk_problem& p) {
    return (floats_together(p, maps_together(p)) + filter_floats(p) + map_floats(p)) * sizeof(float);
}

static void run_full(const Call& call) {
    const rk_problem& p = *call.problem;
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int64_t all = group_count(p.channels), together = maps_together(p), kept = kept_filters(p, together);
    const int64_t jobs = divide_up(all, together) * p.batch, map = map_floats(p), pitch = p.in_w * kLanes;
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float* const written = reinterpret_cast<float*>(call.workspace + thread * call.workspace_stride);
        float *const whole = written + kept * factors_floats(p), *const maps = whole + filter_floats(p);
        float *x[kMostMaps], *y[kMostMaps], *const scratch = maps + 2 * together * map;
        for (int64_t g = 0; g < together; g++) {
            x[g] = maps + g * map;
            y[g] = maps + (together + g) * map;
        }
        Taps factors[kMostMaps];
        int64_t read = -1;
        for (int64_t i = jobs * thread / threads; i < jobs * (thread + 1) / threads; i++) {
            const int64_t n = i % p.batch, first = i / p.batch * together, groups = at_most(together, all - first);
            Image source[kMostMaps], target[kMostMaps];
            for (int64_t g = 0; g < groups; g++) {
                const auto image = [&](void* tensor, const int64_t* stride) {
                    return group_image(tensor, stride, p.in_h, p.in_w, p.channels, p.dtype, n, first + g);
                };
                const Image input = image(call.input, p.input_stride), output = image(call.output, p.output_stride);
                source[g] = flipped ? output : input;
                target[g] = flipped ? input : output;
            }
            read_tiles(source, groups, 0, 0, p.in_h, p.in_w, x, pitch);
            for (int64_t g = 0; g < groups; g++) {
                if (read != first && g % kLineGroups == 0) {
                    find_factors(p, call.weight, first + g, at_most(kLineGroups, groups - g),
                                 written + g % kept * factors_floats(p), whole, factors + g);
                    fetch_next_filters(p, call.weight, first + g);
                }
                multiply_map(p, factors[g], x[g], y[g], scratch);
            }
            read = first;
            write_tiles(target, groups, 0, 0, p.in_h, p.in_w, y, pitch, call.bias, p.relu);
        }
    }
}

}  // namespace direct
}  // namespace RK_ISA

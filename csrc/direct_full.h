// Forward pass and input gradient of the direct algorithm where every input reaches every output: H x W inputs, as many
// outputs and 2H - 1 x 2W - 1 taps, as of large kernels on the small maps of the last stages.
//
// Workspace of one thread: a filter, a map and a half, and two maps and the factors of the groups that are read together:
// less than 2 MiB.
#pragma once

#include <omp.h>

#include "direct_halves.h"
#include "pack_groups.h"

namespace RK_ISA {
namespace direct {

constexpr int kMostFull = 32;  // rows or columns; the transform wins before
constexpr int64_t kLineGroups = RK_FILTER_LANES / kLanes;  // that share cache lines where channels are adjacent
constexpr int64_t kMostMaps = 16;            // read and written together; more gain nothing
constexpr int64_t kMapsBytes = 192 << 10;    // of them, with factors; with 256 KiB maps of 14x14 take 4 % longer
constexpr int64_t kFetchedFloats = 4 << 10;  // of the filters of a line; those of 27x27 taps do not gain

static bool suits_full(const rk_problem& p) {
    return p.pass != RK_GRAD_WEIGHT && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1 &&
           p.in_h == p.out_h && p.in_w == p.out_w && p.in_h <= kMostFull && p.in_w <= kMostFull &&
           p.kernel_h == 2 * p.in_h - 1 && p.kernel_w == 2 * p.in_w - 1 && p.pad_top == p.in_h - 1 &&
           p.pad_left == p.in_w - 1;
}

static int64_t map_floats(const rk_problem& p) { return int64_t(p.in_h) * p.in_w * kLanes; }

// The factors of a group's filter: as they lie in a packed one, or written to `written`; `whole` holds a filter.
static Taps find_factors(const rk_problem& p, const Blocks& b, const float* weight, int64_t group, float* whole,
                         float* written) {
    if (p.packed_weight) {
        const Image filter = filter_image(p, weight, group);
        const Taps taps = {reinterpret_cast<const float*>(filter.data), filter.w};
        if (is_whole(b)) return taps;
        make_factors(b, taps, written);
    } else if (!is_whole(b)) {
        read_filter(p, weight, group, whole);
        make_factors(b, {whole, kLanes}, written);
    } else {
        read_filter(p, weight, group, written);
    }
    return {written, kLanes};
}

// Brings the packed filters of the next line's groups into the second level cache.
static RK_INLINE void fetch_next_filters(const rk_problem& p, const float* weight, int64_t group) {
    const int64_t floats = int64_t(p.kernel_h) * p.kernel_w * RK_FILTER_LANES;
    if (!p.packed_weight || floats > kFetchedFloats || group + kLineGroups >= group_count(p.channels)) return;
    const float* const next = weight + (group / kLineGroups + 1) * floats;
    for (int64_t i = 0; i < floats; i += kLine) __builtin_prefetch(next + i, 0, 2);
}

// Filters whose factors are kept: for other images.
static int64_t kept_filters(const rk_problem& p, int64_t groups) { return p.batch > 1 ? groups : 1; }

static int64_t floats_together(const rk_problem& p, int64_t groups) {
    return kept_filters(p, groups) * factors_floats(blocks_of(p)) + 2 * groups * map_floats(p);
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
    const Blocks b = blocks_of(p);
    return (floats_together(p, maps_together(p)) + filter_floats(p) + scratch_floats(b)) * sizeof(float);
}

// The packed maps of some groups, `floats` apart: from column `col` on, where each of them has columns of a block.
struct Columns {
    float* of_group[kMostMaps];

    Columns(float* maps, int64_t groups, int64_t floats, int64_t rows, int64_t col) {
        for (int64_t g = 0; g < groups; g++) of_group[g] = maps + g * floats + rows * col * kLanes;
    }
};

static void run_full(const Call& call) {
    const rk_problem& p = *call.problem;
    const Blocks b = blocks_of(p);
    const bool flipped = p.pass == RK_GRAD_INPUT;
    const int64_t all = group_count(p.channels), together = maps_together(p), kept = kept_filters(p, together);
    const int64_t jobs = divide_up(all, together) * p.batch, map = map_floats(p), pitch = b.cols * kLanes;
#pragma omp parallel num_threads(p.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float* const written = reinterpret_cast<float*>(call.workspace + thread * call.workspace_stride);
        float *const whole = written + kept * factors_floats(b), *const x = whole + filter_floats(p);
        float *const y = x + together * map, *const scratch = y + together * map;
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
            for (int64_t col = 0; col < p.in_w; col += b.cols)
                read_tiles(source, groups, 0, col, p.in_h, b.cols, Columns(x, groups, map, p.in_h, col).of_group, pitch);
            for (int64_t g = 0; g < groups; g++) {
                if (read != first) {
                    float* const own = written + g % kept * factors_floats(b);
                    factors[g] = find_factors(p, b, call.weight, first + g, whole, own);
                    if (g % kLineGroups == 0) fetch_next_filters(p, call.weight, first + g);
                }
                multiply_map(b, factors[g], x + g * map, y + g * map, scratch);
            }
            read = first;
            for (int64_t col = 0; col < p.in_w; col += b.cols)
                write_tiles(target, groups, 0, col, p.in_h, b.cols, Columns(y, groups, map, p.in_h, col).of_group, pitch,
                            call.bias, p.relu);
        }
    }
}

}  // namespace direct
}  // namespace RK_ISA

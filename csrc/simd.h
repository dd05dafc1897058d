// Vector of RK_LANES float32 of the instruction set being compiled.
//
// Everything that is compiled per instruction set lives in namespace RK_ISA and uses no library template, so
// that the linker can never hand code of one instruction set to another.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define RK_INLINE inline __attribute__((always_inline))

namespace RK_ISA {

constexpr int kLanes = RK_LANES;
constexpr int64_t kLine = 16;  // floats of a cache line
typedef float Vec __attribute__((vector_size(RK_LANES * 4)));
typedef uint32_t UVec __attribute__((vector_size(RK_LANES * 4)));

static RK_INLINE Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static RK_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

// Stores past the caches at an aligned place; other threads may read it after `finish_streams`.
static RK_INLINE void stream(float* p, Vec v) {
#if !defined(__x86_64__)
    store(p, v);
#elif RK_LANES == 16
    _mm512_stream_ps(p, (__m512)v);
#elif RK_LANES == 8
    _mm256_stream_ps(p, (__m256)v);
#else
    _mm_stream_ps(p, (__m128)v);
#endif
}

static RK_INLINE void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// The first `count` <= kLanes floats, zeros in the other lanes; reads nothing past them.
static RK_INLINE Vec load_some(const float* p, int count) {
#if RK_LANES == 16
    return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#elif RK_LANES == 8
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (Vec)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
#else
    Vec v = {};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
#endif
}

#if RK_LANES > 4
#if RK_LANES == 16
typedef __mmask16 Mask;
#else
typedef __m256i Mask;
#endif

// The lanes begin <= i < end; 0 <= begin <= end <= kLanes.
static RK_INLINE Mask lanes_between(int begin, int end) {
#if RK_LANES == 16
    return (__mmask16)((1u << end) - (1u << begin));
#else
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                               _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
#endif
}

// Some lanes, zeros in the others, which are not read.
static RK_INLINE Vec load_lanes(const float* p, Mask lanes) {
#if RK_LANES == 16
    return (Vec)_mm512_maskz_loadu_ps(lanes, p);
#else
    return (Vec)_mm256_maskload_ps(p, lanes);
#endif
}
#endif

// Writes the first `count` <= kLanes lanes and nothing past them.
static RK_INLINE void store_some(float* p, Vec v, int count) {
#if RK_LANES == 16
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#elif RK_LANES == 8
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane), (__m256)v);
#else
    for (int i = 0; i < count; i++) p[i] = v[i];
#endif
}

static RK_INLINE Vec broadcast(float x) { return x - Vec{}; }  // x + 0 would not fold: it changes -0

static RK_INLINE Vec max_with_zero(Vec v) { return v < Vec{} ? Vec{} : v; }  // keeps NaN

// Four floats of one channel; a Vec is kLanes / 4 of them side by side.
typedef float Quad __attribute__((vector_size(16)));
constexpr int kQuads = kLanes / 4;

static RK_INLINE Vec join(const Quad* q) {
#if RK_LANES == 16
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256((__m128)q[0]), (__m128)q[1], 1);
    const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256((__m128)q[2]), (__m128)q[3], 1);
    return (Vec)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#elif RK_LANES == 8
    return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)q[0]), (__m128)q[1], 1);
#else
    return q[0];
#endif
}

static RK_INLINE Quad quad_of(Vec v, int i) {
    Quad all[kQuads];
    memcpy(all, &v, sizeof v);
    return all[i];
}

// A constant number as an argument.
template <int I>
struct Index {
    constexpr operator int() const { return I; }
};

template <int... I>
struct Indices {};

#if RK_LANES == 4
using Lanes = Indices<0, 1, 2, 3>;
#elif RK_LANES == 8
using Lanes = Indices<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using Lanes = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#endif

// Interleaves the lower (kHalf = 0) or upper (2) two floats of each quad of a with those of b.
template <int kHalf, int... I>
static RK_INLINE Vec interleave(Vec a, Vec b, Indices<I...>) {
    return __builtin_shufflevector(a, b, ((I & ~3) + kHalf + (I & 3) / 2 + (I & 1) * kLanes)...);
}

// The lower (kHalf = 0) or upper (2) two floats of each quad of a, then those of b.
template <int kHalf, int... I>
static RK_INLINE Vec halves(Vec a, Vec b, Indices<I...>) {
    return __builtin_shufflevector(a, b, ((I & ~3) + kHalf + (I & 1) + (I & 2) / 2 * kLanes)...);
}

// Transposes the 4 x 4 matrix that each quad position of v[0 .. 4) holds.
static RK_INLINE void transpose(Vec* v) {
    const Vec low01 = interleave<0>(v[0], v[1], Lanes{}), low23 = interleave<0>(v[2], v[3], Lanes{});
    const Vec high01 = interleave<2>(v[0], v[1], Lanes{}), high23 = interleave<2>(v[2], v[3], Lanes{});
    v[0] = halves<0>(low01, low23, Lanes{});
    v[1] = halves<2>(low01, low23, Lanes{});
    v[2] = halves<0>(high01, high23, Lanes{});
    v[3] = halves<2>(high01, high23, Lanes{});
}

// Two of the quads of a, then two of b, as their numbers say.
template <int A, int B, int C, int D, int... I>
static RK_INLINE Vec quads(Vec a, Vec b, Indices<I...>) {
    constexpr int from[] = {A, B, C + kQuads, D + kQuads};
    return __builtin_shufflevector(a, b, (from[I / 4] * 4 + I % 4)...);
}

// Transposes the kLanes x kLanes matrix whose rows are v[0 .. kLanes).
static RK_INLINE void transpose_all(Vec* v) {
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += 4) transpose(v + i);
#if RK_LANES == 16
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Vec a = v[i], b = v[i + 4], c = v[i + 8], d = v[i + 12];
        const Vec low01 = quads<0, 1, 0, 1>(a, b, Lanes{}), low23 = quads<0, 1, 0, 1>(c, d, Lanes{});
        const Vec high01 = quads<2, 3, 2, 3>(a, b, Lanes{}), high23 = quads<2, 3, 2, 3>(c, d, Lanes{});
        v[i] = quads<0, 2, 0, 2>(low01, low23, Lanes{});
        v[i + 4] = quads<1, 3, 1, 3>(low01, low23, Lanes{});
        v[i + 8] = quads<0, 2, 0, 2>(high01, high23, Lanes{});
        v[i + 12] = quads<1, 3, 1, 3>(high01, high23, Lanes{});
    }
#elif RK_LANES == 8
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Vec a = v[i], b = v[i + 4];
        v[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
#endif
}

}  // namespace RK_ISA

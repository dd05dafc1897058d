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
typedef float Vec __attribute__((vector_size(RK_LANES * 4)));
typedef uint32_t UVec __attribute__((vector_size(RK_LANES * 4)));

static RK_INLINE Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static RK_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

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

static RK_INLINE Vec broadcast(float x) { return Vec{} + x; }

static RK_INLINE Vec max_with_zero(Vec v) { return v < Vec{} ? Vec{} : v; }  // keeps NaN

template <int... I>
struct Indices {};

#if RK_LANES == 4
using Lanes = Indices<0, 1, 2, 3>;
#elif RK_LANES == 8
using Lanes = Indices<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using Lanes = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#endif

// Exchanges the off-diagonal `kSize` x `kSize` blocks of two rows of a matrix.
template <int kSize, int... I>
static RK_INLINE void exchange(Vec& a, Vec& b, Indices<I...>) {
    const Vec low = __builtin_shufflevector(a, b, ((I & kSize) ? kLanes + (I ^ kSize) : I)...);
    b = __builtin_shufflevector(a, b, ((I & kSize) ? kLanes + I : (I ^ kSize))...);
    a = low;
}

template <int kSize>
static RK_INLINE void transpose_step(Vec* v) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++)
        if (!(i & kSize)) exchange<kSize>(v[i], v[i + kSize], Lanes{});
}

// Transposes the matrix whose rows are v[0 .. kLanes).
static RK_INLINE void transpose(Vec* v) {
    transpose_step<1>(v);
    transpose_step<2>(v);
#if RK_LANES >= 8
    transpose_step<4>(v);
#endif
#if RK_LANES >= 16
    transpose_step<8>(v);
#endif
}

}  // namespace RK_ISA

// Elements of a tensor in memory: float32, bfloat16 and float16, converted to and from float32 vectors.
#pragma once

#include "simd.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace RK_ISA {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

typedef uint16_t HalfVec __attribute__((vector_size(RK_LANES * 2)));

static RK_INLINE HalfVec load_bits(const void* p) {
    HalfVec bits;
    memcpy(&bits, p, sizeof bits);
    return bits;
}

static RK_INLINE Vec load(const BFloat16* p) { return (Vec)(__builtin_convertvector(load_bits(p), UVec) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
static RK_INLINE void store(BFloat16* p, Vec v) {
    const UVec bits = (UVec)v;
    const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const UVec result = v == v ? rounded : (bits >> 16) | 0x40;
    const HalfVec half = __builtin_convertvector(result, HalfVec);
    memcpy(p, &half, sizeof half);
}

static RK_INLINE Vec load(const Float16* p) {
#if RK_LANES == 16
    return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif RK_LANES == 8
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
    return (Vec)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)load_bits(p)));
#else
    const UVec bits = __builtin_convertvector(load_bits(p), UVec);
    const UVec magnitude = (bits & 0x7fff) << 13;
    // rescaling by 2^112 moves the exponent's bias and makes subnormals normal
    const UVec scaled = (UVec)((Vec)magnitude * 0x1p112f);
    const UVec special = magnitude | 0x7f800000;  // infinity, NaN
    return (Vec)((magnitude >= 0x0f800000 ? special : scaled) | (bits & 0x8000) << 16);
#endif
}

// Rounds to nearest, ties to even; overflows to infinity.
static RK_INLINE void store(Float16* p, Vec v) {
#if RK_LANES == 16
    _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif RK_LANES == 8
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    const HalfVec half = (HalfVec)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v));
    memcpy(p, &half, sizeof half);
#else
    const UVec sign = (UVec)v & 0x80000000, magnitude = (UVec)v ^ sign;
    // normal: round off 13 bits of the mantissa, then move the exponent's bias
    const UVec normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    // subnormal: adding 0.5 leaves the result, rounded by the hardware, in the lowest bits
    const UVec subnormal = (UVec)((Vec)magnitude + 0.5f) - 0x3f000000;
    UVec result = magnitude < 0x38800000 ? subnormal : normal;
    result = magnitude >= 0x477ff000 ? (UVec{} + 0x7c00) : result;  // 65520 and more
    result = magnitude > 0x7f800000 ? (0x7e00 | (magnitude >> 13 & 0x3ff)) : result;
    const HalfVec half = __builtin_convertvector(result | sign >> 16, HalfVec);
    memcpy(p, &half, sizeof half);
#endif
}

static RK_INLINE Quad load_quad(const float* p, int count) {
    Quad q = {};
    if (count == 4)
        memcpy(&q, p, sizeof q);
    else
        for (int i = 0; i < count; i++) q[i] = p[i];
    return q;
}

static RK_INLINE void store_quad(float* p, Quad q, int count) {
    if (count == 4)
        memcpy(p, &q, sizeof q);
    else
        for (int i = 0; i < count; i++) p[i] = q[i];
}

template <class T>
static RK_INLINE Vec load_some(const T* p, int count) {
    T all[kLanes] = {};
    for (int i = 0; i < count; i++) all[i] = p[i];
    return load(all);
}

template <class T>
static RK_INLINE void store_some(T* p, Vec v, int count) {
    T all[kLanes];
    store(all, v);
    for (int i = 0; i < count; i++) p[i] = all[i];
}

template <class T>
static RK_INLINE Quad load_quad(const T* p, int count) {
    if (count < 4) return quad_of(load_some(p, count), 0);
    T all[kLanes] = {};
    memcpy(all, p, 4 * sizeof *p);
    return quad_of(load(all), 0);
}

template <class T>
static RK_INLINE void store_quad(T* p, Quad q, int count) {
    const Quad all[kQuads] = {q};
    if (count < 4) return store_some(p, join(all), count);
    T converted[kLanes];
    store(converted, join(all));
    memcpy(p, converted, 4 * sizeof *p);
}

}  // namespace RK_ISA

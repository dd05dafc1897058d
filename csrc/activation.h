// Activations of a vector.
#pragma once

#include "simd.h"

namespace RK_ISA {

// 1 / v to within two units in the last place, for v neither tiny nor huge.
static RK_INLINE Vec reciprocal(Vec v) {
#if RK_LANES == 16
    const Vec near = (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
    return near * (2.0f - v * near);
#else
    return 1.0f / v;
#endif
}

// Beyond 5.6, Phi is constant to within rounding.
static RK_INLINE Vec within_gelu(Vec x) {
    const Vec limit = broadcast(5.6f), t = x > limit ? limit : x;
    return t < -limit ? -limit : t;
}

// x * Phi(x), Phi(x) = 1/2 + x P(x^2) / Q(x^2): minimax on |x| <= 5.6, error 1e-8 before rounding; constant beyond.
static RK_INLINE Vec gelu(Vec x) {
    const Vec t = within_gelu(x), s = t * t;
    Vec p = broadcast(2.2145297151610066e-08f), q = broadcast(1.1802121662185527e-06f);
    p = p * s + 6.356540779961506e-06f, q = q * s + 7.510215073125437e-05f;
    p = p * s + 0.00017385136743541807f, q = q * s + 0.0019129817374050617f;
    p = p * s + 0.004707263316959143f, q = q * s + 0.028940120711922646f;
    p = p * s + 0.03437616303563118f, q = q * s + 0.2528339922428131f;
    p = p * s + 0.398942232131958f, q = q * s + 1.0f;
    return x * (t * p * reciprocal(q) + 0.5f);
}

// The derivative of gelu, Phi(x) + x phi(x) = 1/2 + x P(x^2) / Q(x^2): minimax on |x| <= 5.6, error 1e-8 before rounding;
// constant beyond.
static RK_INLINE Vec gelu_slope(Vec x) {
    const Vec t = within_gelu(x), s = t * t;
    Vec p = broadcast(1.5000121639972747e-8f), q = broadcast(1.2874596115739655e-9f);
    q = q * s + 2.544315158787454e-7f;
    p = p * s + 6.0112545452675165e-7f, q = q * s + 8.7072696633857232e-6f;
    p = p * s + 3.41186974609335e-5f, q = q * s + 0.00021472794268188848f;
    p = p * s + 7.8520690541189433e-5f, q = q * s + 0.0036199058403673924f;
    p = p * s + 0.014133446700485722f, q = q * s + 0.041599614011842487f;
    p = p * s + -0.029263611430229742f, q = q * s + 0.29665670369414126f;
    p = p * s + 0.79788455071824522f, q = q * s + 1.0f;
    return t * p * reciprocal(q) + 0.5f;
}

}  // namespace RK_ISA

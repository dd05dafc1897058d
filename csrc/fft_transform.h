// One-dimensional transforms of size outer * inner, in two passes over a scratch buffer of L1 size.
//
// With n = inner * n1 + n2 and k = k1 + outer * k2, the forward transform is
//   outer pass: for each n2, a transform over n1, times the twiddle exp(-2 pi i n2 k1 / size) -> scratch[k1][n2]
//   inner pass: for each k1, a transform over n2 -> bin k1 + outer * k2
// and the inverse runs the same passes backwards. What an inner pass does with the bins while they are in registers
// makes a convolution of it, or untangles two real rows; see fft_inner.h. A complex element is kLanes real parts
// followed by kLanes imaginary parts.
#pragma once

#include <stddef.h>

#include "fft_codelets.h"

namespace RK_ISA::spectral {

constexpr int kComplex = 2 * kLanes;
constexpr int kMaxRadix = 16;
constexpr int kScratchPitch = kMaxRadix + 1;  // elements; odd, so that the rows spread over the cache sets
constexpr int kScratchFloats = kMaxRadix * kScratchPitch * kComplex;

#define RK_FOR_RADICES(X) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(12) X(16)

// Complex elements in memory: n is at re + n * stride and im + n * stride. Two real rows make one complex row.
struct Elements {
    float* re;
    float* im;
    ptrdiff_t stride;
};

// A size and its twiddles. Element n counts as element n - shift of the sequence, modulo the size.
struct Transform {
    int outer, inner, shift;
    alignas(64) float re[kMaxRadix][kMaxRadix], im[kMaxRadix][kMaxRadix];  // [k1][n2]

    int size() const { return outer * inner; }
};

// exp(2 pi i e / size) for all e.
struct Roots {
    int size;
    float re[kMaxRadix * kMaxRadix], im[kMaxRadix * kMaxRadix];
};

static void make_roots(Roots& roots, int size) {
    roots.size = size;
    for (int e = 0; e < size; e++) {
        const Root w = root(e, size);
        roots.re[e] = float(w.re);
        roots.im[e] = float(w.im);
    }
}

static void make_transform(Transform& t, const Roots& roots, int outer, int inner, int shift) {
    t.outer = outer;
    t.inner = inner;
    t.shift = shift;
    const int size = roots.size, first = (size - shift % size) % size;
    for (int n2 = 0; n2 < inner; n2++)
        for (int k1 = 0, e = 0; k1 < outer; k1++, e = (e + first + n2) % size) {
            t.re[k1][n2] = roots.re[e];
            t.im[k1][n2] = roots.im[e];
        }
}

// Addresses base + i * step for constant i < N, from few registers.
template <int N, class T>
struct Steps {
    static constexpr int kGroups = (N + 3) / 4;
    T* base[kGroups];
    ptrdiff_t step, step3;

    RK_INLINE Steps(T* first, ptrdiff_t step) : step(step), step3(3 * step) {
        base[0] = first;
        for (int g = 1; g < kGroups; g++) base[g] = base[g - 1] + 4 * step;
    }
    RK_INLINE T* operator[](int i) const { return base[i / 4] + (i % 4 == 3 ? step3 : i % 4 * step); }
};

// The outer passes for n2 in [begin, end), where only the first `active` values of n1 are read or written.

template <int R, int active>
static void outer_forward(const Transform& t, Elements in, float* scratch, int begin, int end) {
    const int inner = t.inner;
    int position = (begin - t.shift) % inner;
    position += position < 0 ? inner : 0;
    const ptrdiff_t step = inner * in.stride;
    for (int n2 = begin; n2 < end; n2++) {
        Vec re[R], im[R];
        const Steps<R, const float> in_re(in.re + n2 * in.stride, step), in_im(in.im + n2 * in.stride, step);
        unroll<R>(RK_LAMBDA(auto n1) {
            re[n1] = n1 < active ? load(in_re[n1]) : Vec{};
            im[n1] = n1 < active ? load(in_im[n1]) : Vec{};
        });
        dft<R>(re, im);
        float* out = scratch + position * kComplex;
        unroll<R>(RK_LAMBDA(auto k1) {
            Vec r = re[k1], i = im[k1];
            if constexpr (k1 > 0 && active > 0) {
                const Vec c = broadcast(t.re[k1][n2]), s = broadcast(t.im[k1][n2]);
                r = re[k1] * c + im[k1] * s;
                i = im[k1] * c - re[k1] * s;
            }
            store(out + k1 * kScratchPitch * kComplex, r);
            store(out + k1 * kScratchPitch * kComplex + kLanes, i);
        });
        position = position + 1 == inner ? 0 : position + 1;
    }
}

struct Identity {
    RK_INLINE Vec operator()(Vec v) const { return v; }
};

// value * scale + bias, not below `floor`; NaN stays.
struct Epilogue {
    Vec scale, bias, floor;
    RK_INLINE Vec operator()(Vec v) const {
        v = v * scale + bias;
        return v < floor ? floor : v;
    }
};

template <int R, int active, class Finish>
static void outer_inverse(const Transform& t, const float* scratch, Elements out, int begin, int end, Finish finish) {
    const ptrdiff_t step = t.inner * out.stride;
    for (int n2 = begin; n2 < end; n2++) {
        Vec re[R], im[R];
        const float* in = scratch + n2 * kComplex;
        unroll<R>(RK_LAMBDA(auto k1) {
            const Vec r = load(in + k1 * kScratchPitch * kComplex);
            const Vec i = load(in + k1 * kScratchPitch * kComplex + kLanes);
            if constexpr (k1 > 0) {
                const Vec c = broadcast(t.re[k1][n2]), s = broadcast(t.im[k1][n2]);
                re[k1] = r * c - i * s;
                im[k1] = i * c + r * s;
            } else {
                re[k1] = r;
                im[k1] = i;
            }
        });
        dft<R>(im, re);
        const Steps<R, float> out_re(out.re + n2 * out.stride, step), out_im(out.im + n2 * out.stride, step);
        unroll<active>(RK_LAMBDA(auto n1) {
            store(out_re[n1], finish(re[n1]));
            store(out_im[n1], finish(im[n1]));
        });
    }
}

struct OuterPasses {
    void (*forward[kMaxRadix + 1][kMaxRadix + 1])(const Transform&, Elements, float*, int, int) = {};
    void (*inverse[kMaxRadix + 1][kMaxRadix + 1])(const Transform&, const float*, Elements, int, int, Identity) = {};
    void (*finish[kMaxRadix + 1][kMaxRadix + 1])(const Transform&, const float*, Elements, int, int, Epilogue) = {};

    constexpr OuterPasses() {
#define RK_FILL(R)                                                    \
    unroll<R + 1>([&](auto active) {                                  \
        forward[R][active] = outer_forward<R, active>;                \
        if constexpr (active > 0) {                                   \
            inverse[R][active] = outer_inverse<R, active, Identity>;  \
            finish[R][active] = outer_inverse<R, active, Epilogue>;   \
        }                                                             \
    });
        RK_FOR_RADICES(RK_FILL)
#undef RK_FILL
    }
};

static constexpr OuterPasses kOuter;

// Outer pass over the first `count` elements; the others are zero.
static inline void forward_outer(const Transform& t, Elements in, int count, float* scratch) {
    const int whole = count / t.inner, rest = count % t.inner;
    if (rest) kOuter.forward[t.outer][whole + 1](t, in, scratch, 0, rest);
    kOuter.forward[t.outer][whole](t, in, scratch, rest, t.inner);
}

// Outer pass that writes the first `count` elements only.
static inline void inverse_outer(const Transform& t, const float* scratch, int count, Elements out) {
    const int whole = count / t.inner, rest = count % t.inner;
    if (rest) kOuter.inverse[t.outer][whole + 1](t, scratch, out, 0, rest, {});
    if (whole) kOuter.inverse[t.outer][whole](t, scratch, out, rest, t.inner, {});
}

static inline void inverse_outer(const Transform& t, const float* scratch, int count, Elements out, Epilogue finish) {
    const int whole = count / t.inner, rest = count % t.inner;
    if (rest) kOuter.finish[t.outer][whole + 1](t, scratch, out, 0, rest, finish);
    if (whole) kOuter.finish[t.outer][whole](t, scratch, out, rest, t.inner, finish);
}

}  // namespace RK_ISA::spectral

// One-dimensional transforms of size outer * inner, in two passes over a scratch buffer of L1 size.
//
// With element n at (n1, n2) and bin k at (k1, k2), the forward transform is
//   outer pass: for each n2, a transform over n1 -> scratch[k1][n2]
//   inner pass: for each k1, a transform over n2 -> bin (k1, k2)
// and the inverse runs the same passes backwards. Where outer and inner are coprime (Good and Thomas),
//   n = inner * n1 + outer * n2 modulo the size, k = k1 modulo outer, k = k2 modulo inner
// and elsewhere (Cooley and Tukey) twiddles exp(-2 pi i n2 k1 / size) are needed between the passes:
//   n = inner * n1 + n2, k = k1 + outer * k2
// What an inner pass does with the bins while they are in registers makes a convolution of it, or untangles two real
// rows; see fft_inner.h. A complex element is kLanes real parts followed by kLanes imaginary parts.
#pragma once

#include <stddef.h>

#include "fft_codelets.h"

namespace RK_ISA::spectral {

constexpr int kComplex = 2 * kLanes;
constexpr int kMaxRadix = 16;
constexpr int kMaxPoints = kMaxRadix * kMaxRadix;
constexpr int kScratchPitch = kMaxRadix + 1;  // elements; odd, so that the rows spread over the cache sets
constexpr int kScratchFloats = kMaxRadix * kScratchPitch * kComplex;

#define RK_FOR_RADICES(X) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(12) X(16)

// A size, the order of its elements, and its twiddles if it needs them. Element n counts as element n - shift of the
// sequence, modulo the size.
struct Transform {
    int outer, inner;
    bool coprime;
    int16_t element[kMaxPoints];                                           // [n2][n1]
    alignas(64) float re[kMaxRadix][kMaxRadix], im[kMaxRadix][kMaxRadix];  // [k1][n2]

    int size() const { return outer * inner; }
};

static int common_divisor(int a, int b) { return b ? common_divisor(b, a % b) : a; }

static void make_twiddles(Transform& t) {
    for (int k1 = 0; k1 < t.outer; k1++)
        for (int n2 = 0; n2 < t.inner; n2++) {
            const Root w = root(n2 * k1, t.size());
            t.re[k1][n2] = float(w.re);
            t.im[k1][n2] = float(w.im);
        }
}

static void make_transform(Transform& t, int outer, int inner, int shift) {
    t.outer = outer;
    t.inner = inner;
    t.coprime = common_divisor(outer, inner) == 1;
    const int size = t.size(), step = t.coprime ? outer : 1, first = (shift % size + size) % size;
    for (int n2 = 0; n2 < inner; n2++)
        for (int n1 = 0; n1 < outer; n1++) t.element[n2 * outer + n1] = int16_t((inner * n1 + step * n2 + first) % size);
    if (!t.coprime) make_twiddles(t);
}

// Complex elements in memory: real and imaginary part of the i-th, in the order [n2][n1], are offset[i] floats after re
// and im. Two real rows make one complex row.
struct Elements {
    float *re, *im;
    const int32_t* offset;
};

// Offsets of the first `count` elements, `stride` apart. All others are at one place, just behind.
struct Offsets {
    int32_t at[kMaxPoints];

    Offsets(const Transform& t, int64_t count, int64_t stride) {
        for (int i = 0; i < t.size(); i++) at[i] = int32_t(stride) * (t.element[i] < count ? t.element[i] : int(count));
    }
    // The first `count` in reverse order.
    void reverse(const Transform& t, int64_t count, int64_t stride) {
        for (int i = 0; i < t.size(); i++)
            if (t.element[i] < count) at[i] = int32_t(stride) * int(count - 1 - t.element[i]);
    }
};

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

template <int R, bool coprime>
static void outer_forward(const Transform& t, Elements in, float* scratch) {
    for (int n2 = 0; n2 < t.inner; n2++, in.offset += R, scratch += kComplex) {
        Vec re[R], im[R];
        unroll<R>(RK_LAMBDA(auto n1) {
            re[n1] = load(in.re + in.offset[n1]);
            im[n1] = load(in.im + in.offset[n1]);
        });
        dft<R>(re, im);
        unroll<R>(RK_LAMBDA(auto k1) {
            Vec r = re[k1], i = im[k1];
            if constexpr (k1 > 0 && !coprime) {
                const Vec c = broadcast(t.re[k1][n2]), s = broadcast(t.im[k1][n2]);
                r = re[k1] * c + im[k1] * s;
                i = im[k1] * c - re[k1] * s;
            }
            store(scratch + k1 * kScratchPitch * kComplex, r);
            store(scratch + k1 * kScratchPitch * kComplex + kLanes, i);
        });
    }
}

// The first `bytes` of pixels that are `step` bytes apart and will soon be written, in two rows: fetched a few at a time, lest
// they hold up what computations load meanwhile.
struct Upcoming {
    const char *pixel = nullptr, *end = nullptr;
    int64_t step = 0, next_row = 0, bytes = 0, at_once = 0;

    RK_INLINE void fetch() {
        for (int64_t n = 0; n < at_once && pixel < end; n++, pixel += step)
            for (int64_t i = 0; i < bytes; i += kLine * sizeof(float)) {
                __builtin_prefetch(pixel + i, 1);
                __builtin_prefetch(pixel + next_row + i, 1);
            }
    }
};

// What happens to results, and between the butterflies.
struct Identity {
    RK_INLINE Vec operator()(Vec v) const { return v; }
    RK_INLINE void between() {}
};

struct Scale {
    Vec factor;
    Upcoming upcoming;
    RK_INLINE Vec operator()(Vec v) const { return v * factor; }
    RK_INLINE void between() { upcoming.fetch(); }
};

template <int R, bool coprime, class Finish>
static void outer_inverse(const Transform& t, const float* scratch, Elements out, Finish finish) {
    for (int n2 = 0; n2 < t.inner; n2++, out.offset += R, scratch += kComplex) {
        Vec re[R], im[R];
        unroll<R>(RK_LAMBDA(auto k1) {
            const Vec r = load(scratch + k1 * kScratchPitch * kComplex);
            const Vec i = load(scratch + k1 * kScratchPitch * kComplex + kLanes);
            if constexpr (k1 > 0 && !coprime) {
                const Vec c = broadcast(t.re[k1][n2]), s = broadcast(t.im[k1][n2]);
                re[k1] = r * c - i * s;
                im[k1] = i * c + r * s;
            } else {
                re[k1] = r;
                im[k1] = i;
            }
        });
        dft<R>(im, re);
        unroll<R>(RK_LAMBDA(auto n1) {
            store(out.re + out.offset[n1], finish(re[n1]));
            store(out.im + out.offset[n1], finish(im[n1]));
        });
        finish.between();
    }
}

// Indexed by whether the radices are coprime and by the outer radix.
struct OuterPasses {
    void (*forward[2][kMaxRadix + 1])(const Transform&, Elements, float*) = {};
    void (*inverse[2][kMaxRadix + 1])(const Transform&, const float*, Elements, Identity) = {};
    void (*scaled[2][kMaxRadix + 1])(const Transform&, const float*, Elements, Scale) = {};

    constexpr OuterPasses() {
#define RK_FILL(R)                                       \
    unroll<2>([&](auto coprime) {                        \
        forward[coprime][R] = outer_forward<R, coprime>; \
        inverse[coprime][R] = outer_inverse<R, coprime>; \
        scaled[coprime][R] = outer_inverse<R, coprime>;  \
    });
        RK_FOR_RADICES(RK_FILL)
#undef RK_FILL
    }
};

static constexpr OuterPasses kOuter;

static inline void forward_outer(const Transform& t, Elements in, float* scratch) {
    kOuter.forward[t.coprime][t.outer](t, in, scratch);
}

static inline void inverse_outer(const Transform& t, const float* scratch, Elements out) {
    kOuter.inverse[t.coprime][t.outer](t, scratch, out, {});
}

static inline void inverse_outer(const Transform& t, const float* scratch, Elements out, Scale scale) {
    kOuter.scaled[t.coprime][t.outer](t, scratch, out, scale);
}

}  // namespace RK_ISA::spectral

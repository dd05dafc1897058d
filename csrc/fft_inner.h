// Inner passes of the transforms in fft_transform.h: what happens to the bins while they are in registers.
#pragma once

#include "fft_transform.h"

namespace RK_ISA::spectral {

template <int R>
static RK_INLINE void load_row(const float* scratch, int k1, Vec* re, Vec* im) {
    unroll<R>(RK_LAMBDA(auto n2) {
        re[n2] = load(scratch + (k1 * kScratchPitch + n2) * kComplex);
        im[n2] = load(scratch + (k1 * kScratchPitch + n2) * kComplex + kLanes);
    });
}

template <int R>
static RK_INLINE void store_row(float* scratch, int k1, const Vec* re, const Vec* im) {
    unroll<R>(RK_LAMBDA(auto n2) {
        store(scratch + (k1 * kScratchPitch + n2) * kComplex, re[n2]);
        store(scratch + (k1 * kScratchPitch + n2) * kComplex + kLanes, im[n2]);
    });
}

// A spectrum of a column is stored in the order of its use: [k1][k2].

template <int R>
static void column_spectrum(const float* scratch, int outer, float* spectrum) {
    for (int k1 = 0; k1 < outer; k1++, spectrum += R * kComplex) {
        Vec re[R], im[R];
        load_row<R>(scratch, k1, re, im);
        dft<R>(re, im);
        unroll<R>(RK_LAMBDA(auto k2) {
            store(spectrum + k2 * kComplex, re[k2]);
            store(spectrum + k2 * kComplex + kLanes, im[k2]);
        });
    }
}

// scratch <- the inverse of (its transform times the spectrum).
template <int R>
static void column_convolve(float* scratch, int outer, const float* spectrum) {
    for (int k1 = 0; k1 < outer; k1++, spectrum += R * kComplex) {
        Vec re[R], im[R];
        load_row<R>(scratch, k1, re, im);
        dft<R>(re, im);
        unroll<R>(RK_LAMBDA(auto k2) {
            const Vec r = re[k2], c = load(spectrum + k2 * kComplex), s = load(spectrum + k2 * kComplex + kLanes);
            re[k2] = r * c - im[k2] * s;
            im[k2] = im[k2] * c + r * s;
        });
        dft<R>(im, re);
        store_row<R>(scratch, k1, re, im);
    }
}

// The same with the other factor not yet transformed.
template <int R>
static void column_product(float* scratch, int outer, const float* factor) {
    for (int k1 = 0; k1 < outer; k1++) {
        Vec re[R], im[R], c[R], s[R];
        load_row<R>(factor, k1, c, s);
        dft<R>(c, s);
        load_row<R>(scratch, k1, re, im);
        dft<R>(re, im);
        unroll<R>(RK_LAMBDA(auto k2) {
            const Vec r = re[k2];
            re[k2] = r * c[k2] - im[k2] * s[k2];
            im[k2] = im[k2] * c[k2] + r * s[k2];
        });
        dft<R>(im, re);
        store_row<R>(scratch, k1, re, im);
    }
}

// spectrum += transform of x times the conjugate of the transform of g.
template <int R>
static void column_correlate(const float* x, const float* g, int outer, float* spectrum) {
    for (int k1 = 0; k1 < outer; k1++, spectrum += R * kComplex) {
        Vec re[R], im[R], c[R], s[R];
        load_row<R>(g, k1, c, s);
        dft<R>(c, s);
        load_row<R>(x, k1, re, im);
        dft<R>(re, im);
        unroll<R>(RK_LAMBDA(auto k2) {
            float* sum = spectrum + k2 * kComplex;
            store(sum, load(sum) + re[k2] * c[k2] + im[k2] * s[k2]);
            store(sum + kLanes, load(sum + kLanes) + im[k2] * c[k2] - re[k2] * s[k2]);
        });
    }
}

template <int R>
static void column_inverse(const float* spectrum, int outer, float* scratch) {
    for (int k1 = 0; k1 < outer; k1++, spectrum += R * kComplex) {
        Vec re[R], im[R];
        unroll<R>(RK_LAMBDA(auto k2) {
            re[k2] = load(spectrum + k2 * kComplex);
            im[k2] = load(spectrum + k2 * kComplex + kLanes);
        });
        dft<R>(im, re);
        store_row<R>(scratch, k1, re, im);
    }
}

// Two real rows a, b were transformed as a + i b: bins k and size - k hold both. Writes twice bin k of a and, `to_b`
// further, of b.
static RK_INLINE void untangle(Vec re, Vec im, Vec mirror_re, Vec mirror_im, float* a, ptrdiff_t to_b) {
    store(a, re + mirror_re);
    store(a + kLanes, im - mirror_im);
    store(a + to_b, im + mirror_im);
    store(a + to_b + kLanes, mirror_re - re);
}

// Of each pair of bins that mirror each other only one is kept: (0, k2 <= R / 2), then all (k1 < outer / 2, k2), then, if
// outer is even, the first half of (outer / 2, k2). The mirror of (0, k2) is (0, R - k2), that of another (k1, k2) is
// (outer - k1, mirror(k2)).
constexpr int mirror(int k2, int radix, bool coprime) { return coprime ? (radix - k2) % radix : radix - 1 - k2; }

template <int R, bool coprime>
static void rows_untangle(const float* scratch, int outer, float* a, ptrdiff_t bin, ptrdiff_t to_b) {
    {
        Vec re[R], im[R];
        load_row<R>(scratch, 0, re, im);
        dft<R>(re, im);
        const Steps<R, float> bins(a, bin);
        unroll<R / 2 + 1>(RK_LAMBDA(auto k2) {
            constexpr int m = (R - k2) % R;
            untangle(re[k2], im[k2], re[m], im[m], bins[k2], to_b);
        });
        a += (R / 2 + 1) * bin;
    }
    for (int k1 = 1; 2 * k1 < outer; k1++, a += R * bin) {
        Vec re[R], im[R], mirror_re[R], mirror_im[R];
        load_row<R>(scratch, k1, re, im);
        dft<R>(re, im);
        load_row<R>(scratch, outer - k1, mirror_re, mirror_im);
        dft<R>(mirror_re, mirror_im);
        const Steps<R, float> bins(a, bin);
        unroll<R>(RK_LAMBDA(auto k2) {
            constexpr int m = mirror(k2, R, coprime);
            untangle(re[k2], im[k2], mirror_re[m], mirror_im[m], bins[k2], to_b);
        });
    }
    if (outer % 2 == 0) {
        Vec re[R], im[R];
        load_row<R>(scratch, outer / 2, re, im);
        dft<R>(re, im);
        const Steps<R, float> bins(a, bin);
        unroll<(R + 1) / 2>(RK_LAMBDA(auto k2) {
            constexpr int m = mirror(k2, R, coprime);
            untangle(re[k2], im[k2], re[m], im[m], bins[k2], to_b);
        });
    }
}

// A bin of a + i b from that of two real rows, and that of its mirror.

static RK_INLINE void tangle(const float* a, ptrdiff_t to_b, Vec& re, Vec& im) {
    re = load(a) - load(a + to_b + kLanes);
    im = load(a + kLanes) + load(a + to_b);
}

static RK_INLINE void tangle_mirror(const float* a, ptrdiff_t to_b, Vec& re, Vec& im) {
    re = load(a) + load(a + to_b + kLanes);
    im = load(a + to_b) - load(a + kLanes);
}

// The way back: the inverse over k2 of a + i b.
template <int R, bool coprime>
static void rows_tangle(const float* a, ptrdiff_t bin, ptrdiff_t to_b, int outer, float* scratch) {
    Vec re[R], im[R];
    const auto finish = RK_LAMBDA(int k1) {
        dft<R>(im, re);
        store_row<R>(scratch, k1, re, im);
    };
    {
        const Steps<R, const float> bins(a, bin);
        unroll<R>(RK_LAMBDA(auto k2) {
            if constexpr (k2 <= R / 2)
                tangle(bins[k2], to_b, re[k2], im[k2]);
            else
                tangle_mirror(bins[R - k2], to_b, re[k2], im[k2]);
        });
        finish(0);
        a += (R / 2 + 1) * bin;
    }
    for (int k1 = 1; 2 * k1 < outer; k1++, a += R * bin) {
        const Steps<R, const float> bins(a, bin);
        unroll<R>(RK_LAMBDA(auto k2) { tangle(bins[k2], to_b, re[k2], im[k2]); });
        finish(k1);
        unroll<R>(RK_LAMBDA(auto k2) { tangle_mirror(bins[mirror(k2, R, coprime)], to_b, re[k2], im[k2]); });
        finish(outer - k1);
    }
    if (outer % 2 == 0) {
        const Steps<R, const float> bins(a, bin);
        unroll<R>(RK_LAMBDA(auto k2) {
            if constexpr (k2 < (R + 1) / 2)
                tangle(bins[k2], to_b, re[k2], im[k2]);
            else
                tangle_mirror(bins[mirror(k2, R, coprime)], to_b, re[k2], im[k2]);
        });
        finish(outer / 2);
    }
}

struct InnerPasses {
    void (*spectrum[kMaxRadix + 1])(const float*, int, float*) = {};
    void (*convolve[kMaxRadix + 1])(float*, int, const float*) = {};
    void (*product[kMaxRadix + 1])(float*, int, const float*) = {};
    void (*correlate[kMaxRadix + 1])(const float*, const float*, int, float*) = {};
    void (*inverse[kMaxRadix + 1])(const float*, int, float*) = {};
    void (*untangle[2][kMaxRadix + 1])(const float*, int, float*, ptrdiff_t, ptrdiff_t) = {};
    void (*tangle[2][kMaxRadix + 1])(const float*, ptrdiff_t, ptrdiff_t, int, float*) = {};

    constexpr InnerPasses() {
#define RK_FILL(R)                                        \
    spectrum[R] = column_spectrum<R>;                     \
    convolve[R] = column_convolve<R>;                     \
    product[R] = column_product<R>;                       \
    correlate[R] = column_correlate<R>;                   \
    inverse[R] = column_inverse<R>;                       \
    unroll<2>([&](auto coprime) {                         \
        untangle[coprime][R] = rows_untangle<R, coprime>; \
        tangle[coprime][R] = rows_tangle<R, coprime>;     \
    });
        RK_FOR_RADICES(RK_FILL)
#undef RK_FILL
    }
};

static constexpr InnerPasses kInner;

}  // namespace RK_ISA::spectral

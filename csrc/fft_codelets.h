// Discrete Fourier transforms of one radix, entirely in registers: natural order in and out.
//
// Every element is a vector of channels, so each operation is vertical. An inverse transform (unscaled) is the
// forward one with real and imaginary parts exchanged: dft<R>(im, re). Outputs that nobody reads cost nothing.
//
// Not for -fno-signed-zeros, with which GCC forms both a - b and b - a. Without it a zero to start a sum from is not free.
#pragma once

#include "simd.h"

namespace RK_ISA::spectral {

// Calls f(Index<0>), ..., f(Index<N - 1>): a loop that is certain to be unrolled, with constant indices.
template <int N, int I = 0, class F>
static RK_INLINE constexpr void unroll(F&& f) {
    if constexpr (I < N) {
        f(Index<I>{});
        unroll<N, I + 1>(f);
    }
}

#define RK_LAMBDA(...) [&](__VA_ARGS__) __attribute__((always_inline))

constexpr double kPi = 3.141592653589793238462643383279502884;

// cos and sin of 2 pi e / n, from Taylor series of an angle of at most pi / 4.
struct Root {
    double re, im;
};

constexpr Root root(int e, int n) {
    e = (e % n + n) % n;
    const int octant = 8 * e / n;
    const int folded = octant % 2 ? (octant + 1) * n - 8 * e : 8 * e - octant * n;  // 0 <= folded <= n
    const double x = kPi / 4 * folded / n;
    double c = 0, s = 0, term = 1;
    for (int k = 0; k < 20; k += 4) {
        c += term;
        s += term *= x / (k + 1);
        c -= term *= x / (k + 2);
        s -= term *= x / (k + 3);
        term *= x / (k + 4);
    }
    const bool swapped = octant == 1 || octant == 2 || octant == 5 || octant == 6;
    const double re = swapped ? s : c, im = swapped ? c : s;
    return {octant >= 2 && octant <= 5 ? -re : re, octant >= 4 ? -im : im};
}

// (re, im) times exp(-2 pi i E / N).
template <int E, int N>
static RK_INLINE void rotate(Vec& re, Vec& im) {
    constexpr int e = E % N;
    if constexpr (e == 0) {
    } else if constexpr (8 * e % N == 0) {
        constexpr int octant = 8 * e / N;
        constexpr float h = float(root(1, 8).re);
        const Vec r = re, i = im;
        if constexpr (octant == 1) {
            re = (r + i) * h;
            im = (i - r) * h;
        } else if constexpr (octant == 2) {
            re = i;
            im = -r;
        } else if constexpr (octant == 3) {
            re = (i - r) * h;
            im = (r + i) * -h;
        } else {
            static_assert(octant < 4, "no butterfly rotates so far");
        }
    } else {
        constexpr float c = float(root(e, N).re), s = float(root(e, N).im);
        const Vec r = re;
        re = r * c + im * s;
        im = im * c - r * s;
    }
}

template <int R>
static RK_INLINE void dft(Vec* re, Vec* im);

template <int R>
static RK_INLINE void dft_odd_prime(Vec* re, Vec* im) {
    constexpr int H = R / 2;
    Vec sum_re[H], sum_im[H], dif_re[H], dif_im[H];
    const Vec first_re = re[0], first_im = im[0];
    unroll<H>(RK_LAMBDA(auto j) {
        sum_re[j] = re[j + 1] + re[R - 1 - j];
        sum_im[j] = im[j + 1] + im[R - 1 - j];
        dif_re[j] = re[j + 1] - re[R - 1 - j];
        dif_im[j] = im[j + 1] - im[R - 1 - j];
        re[0] += sum_re[j];
        im[0] += sum_im[j];
    });
    unroll<H>(RK_LAMBDA(auto frequency) {
        constexpr int k = frequency;
        constexpr Root first = root(k + 1, R);
        Vec even_re = first_re + sum_re[0] * float(first.re), odd_re = dif_re[0] * float(first.im);
        Vec even_im = first_im + sum_im[0] * float(first.re), odd_im = dif_im[0] * float(first.im);
        unroll<H - 1>(RK_LAMBDA(auto j) {
            constexpr Root w = root((j + 2) * (k + 1), R);
            even_re += sum_re[j + 1] * float(w.re);
            even_im += sum_im[j + 1] * float(w.re);
            odd_re += dif_re[j + 1] * float(w.im);
            odd_im += dif_im[j + 1] * float(w.im);
        });
        re[k + 1] = even_re + odd_im;
        im[k + 1] = even_im - odd_re;
        re[R - 1 - k] = even_re - odd_im;
        im[R - 1 - k] = even_im + odd_re;
    });
}

// R = A * B: index n = B a + b, frequency k = a' + A b'. Coprime factors need no twiddles (Good and Thomas).
template <int A, int B, bool coprime>
static RK_INLINE void dft_composite(Vec* re, Vec* im) {
    constexpr int R = A * B;
    Vec x_re[R], x_im[R];  // [a][b]
    unroll<B>(RK_LAMBDA(auto column) {
        constexpr int b = column, start = coprime ? A * b : b;
        Vec y_re[A], y_im[A];
        unroll<A>(RK_LAMBDA(auto a) {
            y_re[a] = re[(B * a + start) % R];
            y_im[a] = im[(B * a + start) % R];
        });
        dft<A>(y_re, y_im);
        unroll<A>(RK_LAMBDA(auto a) {
            if constexpr (!coprime) rotate<a * b, R>(y_re[a], y_im[a]);
            x_re[a * B + b] = y_re[a];
            x_im[a * B + b] = y_im[a];
        });
    });
    unroll<A>(RK_LAMBDA(auto a) { dft<B>(x_re + a * B, x_im + a * B); });
    unroll<R>(RK_LAMBDA(auto k) {
        constexpr int b = coprime ? k % B : k / A;
        re[k] = x_re[k % A * B + b];
        im[k] = x_im[k % A * B + b];
    });
}

template <int R>
static RK_INLINE void dft(Vec* re, Vec* im) {
    if constexpr (R == 2) {
        const Vec r = re[1], i = im[1];
        re[1] = re[0] - r;
        im[1] = im[0] - i;
        re[0] += r;
        im[0] += i;
    } else if constexpr (R == 4) {
        dft_composite<2, 2, false>(re, im);
    } else if constexpr (R == 6) {
        dft_composite<2, 3, true>(re, im);
    } else if constexpr (R == 8) {
        dft_composite<2, 4, false>(re, im);
    } else if constexpr (R == 9) {
        dft_composite<3, 3, false>(re, im);
    } else if constexpr (R == 10) {
        dft_composite<2, 5, true>(re, im);
    } else if constexpr (R == 12) {
        dft_composite<3, 4, true>(re, im);
    } else if constexpr (R == 16) {
        dft_composite<4, 4, false>(re, im);
    } else {
        static_assert(R == 3 || R == 5 || R == 7, "no transform of this radix");
        dft_odd_prime<R>(re, im);
    }
}

}  // namespace RK_ISA::spectral

// Multiply-adds in registers only: the roofline that kernels are held against.
#pragma once

#include <omp.h>

#include "simd.h"

namespace RK_ISA {

static double fma_peak(int threads) {
    constexpr int kChains = 12, kRounds = 4000000;
    double start = 0, end = 0;
    float sink = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sink)
    {
        Vec sums[kChains];
        for (int i = 0; i < kChains; i++) sums[i] = broadcast(float(i));
        Vec a = broadcast(0.5f), b = broadcast(0.25f);
        asm volatile("" : "+m"(a), "+m"(b));
        const Vec scale = a, shift = b;
#pragma omp barrier
#pragma omp master
        start = omp_get_wtime();
        for (int round = 0; round < kRounds; round++) {
#pragma GCC unroll 12
            for (int i = 0; i < kChains; i++) sums[i] = sums[i] * scale + shift;
        }
#pragma omp barrier
#pragma omp master
        end = omp_get_wtime();
        for (int i = 0; i < kChains; i++) sink += sums[i][0];
    }
    volatile float keep = sink;
    (void)keep;
    return 2.0 * kChains * kRounds * kLanes * threads / (end - start);
}

}  // namespace RK_ISA

// Vector of RK_LANES float32 of the instruction set being compiled.
//
// Everything that is compiled per instruction set lives in namespace RK_ISA and uses no library template, so
// that the linker can never hand code of one instruction set to another.
#pragma once

#include <stdint.h>
#include <string.h>

#define RK_INLINE inline __attribute__((always_inline))

namespace RK_ISA {

constexpr int kLanes = RK_LANES;
typedef float Vec __attribute__((vector_size(RK_LANES * sizeof(float))));

static RK_INLINE Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static RK_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

static RK_INLINE Vec broadcast(float x) { return Vec{} + x; }

static RK_INLINE Vec max_with_zero(Vec v) { return v > Vec{} ? v : Vec{}; }

}  // namespace RK_ISA

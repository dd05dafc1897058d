// Pieces of matrices that are stored transposed.
#pragma once

#include "pointwise_tile.h"

namespace RK_ISA {
namespace matmul {

// Rows of up to kLanes floats, `stride` apart, as columns; what is missing is zero.
static RK_INLINE void load_transposed(const float* data, int64_t stride, int64_t rows, int64_t columns, Vec v[kLanes]) {
    for (int64_t i = 0; i < kLanes; i++) v[i] = i < rows && columns > 0 ? load_some(data + i * stride, int(columns)) : Vec{};
    transpose_all(v);
}

static RK_INLINE int64_t limited(int64_t size) { return pointwise::smaller(kLanes, pointwise::larger(0, size)); }

}  // namespace matmul
}  // namespace RK_ISA

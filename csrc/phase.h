// Strides and dilations as sums of problems without either.
//
// Along one axis, input i, output o and tap k meet where i = stride * o + dilation * k - pad. When one of stride
// and dilation is 1, the other splits the axis into that many phases. In each, sub-lattices of the three are
// joined by i' = o' + k' - pad'; every input is in one phase; dilation splits the outputs, stride splits the taps.
#pragma once

#include <stdint.h>

namespace RK_ISA {

// The elements first, first + step, ... of an axis.
struct Lattice {
    int64_t first, step, count;
};

struct Phase {
    Lattice input, output, taps;
    int64_t pad;
};

struct Axis {
    int64_t input, output, taps, stride, dilation, pad;
};

static int64_t phase_count(const Axis& a) { return a.stride * a.dilation; }

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static Lattice lattice(int64_t first, int64_t step, int64_t size) {
    return {first, step, first < size ? divide_up(size - first, step) : 0};
}

static Phase phase(const Axis& a, int64_t index) {
    const int64_t step = phase_count(a);
    if (step == 1) return {{0, 1, a.input}, {0, 1, a.output}, {0, 1, a.taps}, a.pad};
    const int64_t residue = ((index - a.pad) % step + step) % step;
    const Lattice all_outputs = {0, 1, a.output}, all_taps = {0, 1, a.taps};
    return {lattice(residue, step, a.input),
            a.dilation > 1 ? lattice(index, step, a.output) : all_outputs,
            a.stride > 1 ? lattice(index, step, a.taps) : all_taps, (residue - index + a.pad) / step};
}

}  // namespace RK_ISA

// The kernels of one instruction set: compiled once for each, with RK_ISA, RK_ISA_NAME and RK_LANES defined.
#include "kernels.h"

#include "direct.h"
#include "fft.h"
#include "peak.h"
#include "pointwise.h"

#define RK_TABLE_NAME2(isa) rk_kernels_##isa
#define RK_TABLE_NAME(isa) RK_TABLE_NAME2(isa)

extern "C" const Kernels RK_TABLE_NAME(RK_ISA);
extern "C" const Kernels RK_TABLE_NAME(RK_ISA) = {
    RK_ISA_NAME,
    {RK_ISA::direct, RK_ISA::fft},
    RK_ISA::fma_peak,
    RK_ISA::pointwise::one,
    RK_ISA::pointwise::pair,
};

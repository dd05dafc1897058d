// The table of one instruction set: compiled once for each, with RK_ISA, RK_ISA_NAME and RK_LANES defined.
#include "kernels.h"

#include "norm.h"
#include "peak.h"
#include "pointwise.h"

namespace RK_ISA {
const Algorithm& direct_algorithm();
const Algorithm& fft_algorithm();
}  // namespace RK_ISA

#define RK_TABLE_NAME2(isa) rk_kernels_##isa
#define RK_TABLE_NAME(isa) RK_TABLE_NAME2(isa)

extern "C" const Kernels RK_TABLE_NAME(RK_ISA);
extern "C" const Kernels RK_TABLE_NAME(RK_ISA) = {
    RK_ISA_NAME,
    {RK_ISA::direct_algorithm, RK_ISA::fft_algorithm},
    RK_ISA::fma_peak,
    RK_ISA::pointwise::workspace_bytes,
    RK_ISA::pointwise::run,
    RK_ISA::norm::forward_any,
    RK_ISA::norm::backward_any,
};

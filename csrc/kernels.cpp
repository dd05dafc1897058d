// The table of one instruction set: compiled once for each, with RK_ISA, RK_ISA_NAME and RK_LANES defined, RK_DEPTHWISE, the
// instruction set whose depthwise algorithms it has, and RK_AMX or RK_PAIRS where its products are those of tiles or by pairs
// of channels.
#include "kernels.h"

#include "norm.h"
#include "peak.h"
#include "pointwise.h"
#if defined(RK_AMX)
#include "matmul_amx.h"
#elif defined(RK_PAIRS)
#include "matmul_pairs.h"
#else
#include "matmul_rows.h"
#endif

namespace RK_DEPTHWISE {
const Algorithm& direct_algorithm();
const Algorithm& fft_algorithm();
}  // namespace RK_DEPTHWISE

#define RK_TABLE_NAME2(isa) rk_kernels_##isa
#define RK_TABLE_NAME(isa) RK_TABLE_NAME2(isa)

extern "C" const Kernels RK_TABLE_NAME(RK_ISA);
extern "C" const Kernels RK_TABLE_NAME(RK_ISA) = {
    RK_ISA_NAME,
    {RK_DEPTHWISE::direct_algorithm, RK_DEPTHWISE::fft_algorithm},
    RK_ISA::fma_peak,
    RK_ISA::pointwise::workspace_bytes,
    RK_ISA::pointwise::run,
#ifdef RK_PAIRS
    RK_ISA::pointwise::pair_sum_bytes,
    RK_ISA::pointwise::sum_layer_pairs,
#else
    nullptr,
    nullptr,
#endif
    RK_ISA::matmul::workspace_bytes,
    RK_ISA::matmul::run,
    RK_ISA::norm::forward_any,
    RK_ISA::norm::backward_any,
};

// Depthwise convolution from its definition: every pass as correlations of tiles, see direct_tile.h.
//
// Infinities and NaNs of the input stay within their receptive fields: products with padding are never formed.
#include "direct_convolve.h"
#include "direct_correlate.h"
#include "direct_full.h"
#include "direct_rows.h"

namespace RK_ISA {
namespace direct {

static bool supports(const rk_problem& p) {
    return (p.stride_h == 1 || p.dilation_h == 1) && (p.stride_w == 1 || p.dilation_w == 1);
}

static size_t workspace_bytes(const rk_problem& p) {
    if (p.pass == RK_GRAD_WEIGHT) return weight_workspace(weight_plan(p));
    if (suits_full(p)) return full_workspace(p);
    Call call = {};
    call.problem = &p;
    return tile_workspace(source(call));
}

// The "spectrum" is every group's packed filter, or what its passes are made of.
static int64_t prepared_floats(const rk_problem& p) { return suits_full(p) ? factors_floats(p) : filter_floats(p); }

static size_t spectrum_bytes(const rk_problem& p) {
    return group_count(p.channels) * prepared_floats(p) * sizeof(float);
}

static void prepare(const Call& call) {
    const rk_problem& p = *call.problem;
    float* packed = static_cast<float*>(const_cast<void*>(call.spectrum));
    for (int64_t group = 0; group < group_count(p.channels); group++) {
        float* const target = packed + group * prepared_floats(p);
        if (suits_full(p))
            factorize(p, call.weight, group, target, reinterpret_cast<float*>(call.workspace));
        else
            read_tile(filter_image(p, call.weight, group), 0, 0, p.kernel_h, p.kernel_w, target, p.kernel_w * kLanes);
    }
}

static void run(const Call& call) {
    const rk_problem& p = *call.problem;
    if (p.pass == RK_GRAD_WEIGHT)
        run_weight_gradient(call);
    else if (suits_full(p))
        run_full(call);
    else if (suits_rows(p) && !call.spectrum)
        run_rows(call);
    else
        run_tiles(call);
}

}  // namespace direct

static const Algorithm kDirect = {
    direct::supports, direct::workspace_bytes, direct::spectrum_bytes, direct::prepare, direct::run,
};

const Algorithm& direct_algorithm();
const Algorithm& direct_algorithm() { return kDirect; }

}  // namespace RK_ISA

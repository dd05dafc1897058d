// Depthwise convolution from its definition: every pass as correlations of tiles, see direct_tile.h.
//
// Infinities and NaNs of the input stay within their receptive fields: products with padding are never formed.
#include "direct_convolve.h"
#include "direct_correlate.h"
#include "direct_correlate_3x3.h"
#include "direct_full.h"
#include "direct_pixels.h"
#if RK_LANES > 4
#include "direct_rows.h"
#endif

namespace RK_ISA {
namespace direct {

static bool supports(const rk_problem& p) {
    return (p.stride_h == 1 || p.dilation_h == 1) && (p.stride_w == 1 || p.dilation_w == 1);
}

static size_t workspace_bytes(const rk_problem& p) {
    if (suits_nine(p)) return nine_workspace(p);
    if (p.pass == RK_GRAD_WEIGHT) return weight_workspace(p);
    if (suits_full(p)) return full_workspace(p);
    if (suits_pixels(p)) return pixels_workspace(p);
    Call call = {};
    call.problem = &p;
    return tile_workspace(source(call));
}

static size_t no_spectrum(const rk_problem&) { return 0; }

static void run(const Call& call) {
    const rk_problem& p = *call.problem;
    if (suits_nine(p))
        run_nine(call);
    else if (p.pass == RK_GRAD_WEIGHT)
        run_weight_gradient(call);
    else if (suits_full(p))
        run_full(call);
    else if (suits_pixels(p))
        run_pixels(call);
#if RK_LANES > 4
    else if (suits_rows(p) && !p.packed_weight)
        run_rows(call);
#endif
    else
        run_tiles(call);
}

}  // namespace direct

static const Algorithm kDirect = {
    direct::supports, direct::workspace_bytes, direct::no_spectrum, nullptr, direct::run,
};

const Algorithm& direct_algorithm();
const Algorithm& direct_algorithm() { return kDirect; }

}  // namespace RK_ISA

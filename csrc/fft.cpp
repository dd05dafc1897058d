// Depthwise convolution by two-dimensional real FFTs, one group of kLanes channels at a time. Images too large for one
// transform are cut into overlapping tiles.
#include "fft_convolve.h"
#include "fft_correlate.h"

namespace RK_ISA {

static const Algorithm kFft = {
    [](const rk_problem& p) {
        spectral::Plan plan;
        return spectral::make_plan(p, plan);
    },
    [](const rk_problem& p) -> size_t {
        spectral::Plan plan;
        return spectral::make_plan(p, plan) ? spectral::workspace_floats(plan) * sizeof(float) : 0;
    },
    [](const rk_problem& p) -> size_t {
        spectral::Plan plan;
        return spectral::make_plan(p, plan) ? plan.groups * plan.spectrum_floats() * sizeof(float) : 0;
    },
    spectral::prepare,
    [](const Call& call) { (call.problem->pass == RK_GRAD_WEIGHT ? spectral::correlate : spectral::convolve)(call); },
};

const Algorithm& fft_algorithm();
const Algorithm& fft_algorithm() { return kFft; }

}  // namespace RK_ISA

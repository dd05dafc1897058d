#include "fft.h"

namespace RK_ISA {
const Algorithm& fft_algorithm();
const Algorithm& fft_algorithm() { return fft; }
}  // namespace RK_ISA

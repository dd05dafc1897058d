#include "direct.h"

namespace RK_ISA {
const Algorithm& direct_algorithm();
const Algorithm& direct_algorithm() { return direct; }
}  // namespace RK_ISA

// What differs between processors of one instruction set.
#pragma once

#include <stdint.h>
#include <unistd.h>

#include "simd.h"

namespace RK_ISA {

// Intel's cores fetch lines in pairs, and distant ones, such as a group's of every pixel, three times as slowly as lines that
// follow each other.
static bool intel() {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

// The level-2 cache of a core.
static int64_t cache_bytes() {
    int64_t bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    static const int64_t known = sysconf(_SC_LEVEL2_CACHE_SIZE);
    bytes = known;
#endif
    return bytes > 0 ? bytes : 1 << 20;
}

}  // namespace RK_ISA

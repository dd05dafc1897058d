// What the files behind the C interface share: the instruction set in use, and workspace.
#pragma once

#include <chrono>
#include <cstdlib>

#include "kernels.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// The instruction set in use.
const Kernels& kernels();

inline size_t round_up(size_t bytes) { return (bytes + 4095) / 4096 * 4096 + 64; }  // + 64: threads differ in cache set

// Makes AddressSanitizer report every access to memory between the workspaces of two threads; `allow` ends that.
inline void forbid([[maybe_unused]] char* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(memory, bytes);
#endif
}

inline void allow([[maybe_unused]] char* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
#endif
}

inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Memory for a call; null where there is none.
struct Memory {
    char* const start;
    explicit Memory(size_t bytes) : start(static_cast<char*>(std::aligned_alloc(64, (bytes / 64 + 1) * 64))) {}
    ~Memory() { std::free(start); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
};

// What one call computes with, whatever instruction set is forced meanwhile.
struct Core {
    const Kernels& isa = kernels();

    const Algorithm& algorithm(const rk_problem& problem) const { return isa.algorithms[problem.algorithm](); }

    size_t workspace_bytes(const rk_problem& problem) const {
        return round_up(algorithm(problem).workspace_bytes(problem)) * problem.threads;
    }
    size_t workspace_bytes(const Products& products) const { return isa.pointwise_bytes(products); }
    size_t workspace_bytes(const MatrixProduct& product) const { return isa.matmul_bytes(product); }

    // `call` has no workspace yet.
    void run(Call call, void (*Algorithm::*step)(const Call&), char* workspace) const {
        const rk_problem& problem = *call.problem;
        const Algorithm& chosen = algorithm(problem);
        const size_t used = chosen.workspace_bytes(problem), stride = round_up(used);
        for (int t = 0; t < problem.threads; t++) forbid(workspace + t * stride + used, stride - used);
        call.workspace = workspace;
        call.workspace_stride = stride;
        (chosen.*step)(call);
        allow(workspace, stride * problem.threads);
    }

    void run(const Products& products, const float* input, const float* residual, float* output,
             char* workspace) const {
        isa.pointwise(products, input, residual, output, reinterpret_cast<float*>(workspace));
    }

    void run(const MatrixProduct& product, float* output, char* workspace) const {
        isa.matmul(product, output, reinterpret_cast<float*>(workspace));
    }
};

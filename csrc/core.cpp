// The C interface: picks the instruction set, allocates the workspace, calls the kernels.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core.h"

#if defined(RK_HAVE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef RK_HAVE_AMX
RK_DECLARE_KERNELS(amx);
#endif
#ifdef RK_HAVE_ZEN4
RK_DECLARE_KERNELS(zen4);
#endif
#ifdef RK_HAVE_AVX512
RK_DECLARE_KERNELS(avx512);
#endif
#ifdef RK_HAVE_AVX2
RK_DECLARE_KERNELS(avx2);
#endif
RK_DECLARE_KERNELS(baseline);

namespace {

struct Candidate {
    const Kernels* kernels;
    bool executable;
};

[[maybe_unused]] bool has_avx512() {
#if defined(RK_HAVE_AVX512) || defined(RK_HAVE_ZEN4) || defined(RK_HAVE_AMX)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

// Whether vectors are added in other units than those of multiply-adds.
[[maybe_unused]] bool adds_beside() {
#ifdef RK_HAVE_ZEN4
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

[[maybe_unused]] bool has_avx2() {
#ifdef RK_HAVE_AVX2
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

// AVX-512 with tiles, whose registers Linux lends to a process that asks for them.
[[maybe_unused]] bool has_amx() {
#if defined(RK_HAVE_AMX) && defined(__linux__)
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24;  // bfloat16 products, tiles
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, features;
    const bool known = has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &features);
    return known && (features & kNeeded) == kNeeded && !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
#else
    return false;
#endif
}

const Candidate* candidates(int* count) {
    static const Candidate list[] = {
#ifdef RK_HAVE_AMX
        {&rk_kernels_amx, has_amx()},
#endif
#ifdef RK_HAVE_ZEN4
        {&rk_kernels_zen4, has_avx512() && adds_beside()},
#endif
#ifdef RK_HAVE_AVX512
        {&rk_kernels_avx512, has_avx512()},
#endif
#ifdef RK_HAVE_ZEN4
        {&rk_kernels_zen4, has_avx512() && !adds_beside()},
#endif
#ifdef RK_HAVE_AVX2
        {&rk_kernels_avx2, has_avx2()},
#endif
        {&rk_kernels_baseline, true},
    };
    *count = sizeof list / sizeof *list;
    return list;
}

const Kernels* find(const char* name) {
    int count;
    const Candidate* list = candidates(&count);
    for (int i = 0; i < count; i++)
        if (list[i].executable && (!name || !*name || !std::strcmp(name, list[i].kernels->isa))) return list[i].kernels;
    return nullptr;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* chosen = current.load(std::memory_order_acquire);
    if (!chosen) {
        chosen = find(nullptr);
        current.store(chosen, std::memory_order_release);
    }
    return *chosen;
}

namespace {

int run_alone(const Call& call, void (*Algorithm::*step)(const Call&)) {
    const Core core;
    const Algorithm& chosen = core.algorithm(*call.problem);
    if (!chosen.supports(*call.problem) || !(chosen.*step)) return RK_UNSUPPORTED;
    const Memory workspace(core.workspace_bytes(*call.problem));
    if (!workspace.start) return RK_OUT_OF_MEMORY;
    core.run(call, step, workspace.start);
    return RK_OK;
}

int run_alone(const Products& products, const float* input, const float* residual, float* output) {
    const Core core;
    const Memory workspace(core.workspace_bytes(products));
    if (!workspace.start) return RK_OUT_OF_MEMORY;
    core.run(products, input, residual, output, workspace.start);
    return RK_OK;
}

}  // namespace

int rk_supports(const rk_problem* problem) {
    return Core().algorithm(*problem).supports(*problem) ? RK_OK : RK_UNSUPPORTED;
}

size_t rk_workspace_bytes(const rk_problem* problem) { return Core().algorithm(*problem).workspace_bytes(*problem); }

size_t rk_spectrum_bytes(const rk_problem* problem) { return Core().algorithm(*problem).spectrum_bytes(*problem); }

int rk_prepare(const rk_problem* problem, const float* weight, void* spectrum) {
    return run_alone(Call{problem, nullptr, const_cast<float*>(weight), spectrum, nullptr, nullptr, nullptr, 0},
                     &Algorithm::prepare);
}

int rk_run(const rk_problem* problem, void* input, float* weight, const void* spectrum, const float* bias,
           void* output) {
    return run_alone(Call{problem, input, weight, spectrum, bias, output, nullptr, 0}, &Algorithm::run);
}

const char* rk_available_isas(void) {
    static const std::string names = [] {
        int count;
        const Candidate* list = candidates(&count);
        std::string joined;
        for (int i = 0; i < count; i++)
            if (list[i].executable) joined += (joined.empty() ? "" : ",") + std::string(list[i].kernels->isa);
        return joined;
    }();
    return names.c_str();
}

const char* rk_isa(void) { return kernels().isa; }

int rk_force_isa(const char* name) {
    const Kernels* wanted = find(name);
    if (!wanted) return RK_UNSUPPORTED;
    current.store(wanted, std::memory_order_release);
    return RK_OK;
}

double rk_fma_peak(int threads) { return kernels().fma_peak(threads); }

size_t rk_pair_sum_bytes(const rk_layer* layer) {
    const Kernels& isa = kernels();
    return isa.pair_sum_bytes ? isa.pair_sum_bytes(*layer) : 0;
}

int rk_sum_pairs(const rk_layer* layer, float* sums) {
    const Kernels& isa = kernels();
    if (!isa.sum_pairs) return RK_UNSUPPORTED;
    isa.sum_pairs(*layer, sums);
    return RK_OK;
}

int rk_pointwise(const rk_layer* layer, int64_t images, int64_t pixels, const float* input, const float* residual,
                 float* output, int threads) {
    return run_alone(Products{layer, nullptr, images, pixels, threads}, input, residual, output);
}

int rk_pointwise_pair(const rk_layer* first, const rk_layer* second, int64_t images, int64_t pixels,
                      const float* input, const float* residual, float* output, int threads) {
    return run_alone(Products{first, second, images, pixels, threads}, input, residual, output);
}

int rk_matmul(const rk_matrix* left, const rk_matrix* right, int64_t rows, int64_t columns, int64_t depth, float* product,
              int threads) {
    const Core core;
    const MatrixProduct wanted{left, right, rows, columns, depth, threads};
    const Memory workspace(core.workspace_bytes(wanted));
    if (!workspace.start) return RK_OUT_OF_MEMORY;
    core.run(wanted, product, workspace.start);
    return RK_OK;
}

int rk_norm_forward(const rk_norm* norm, int64_t rows, int64_t channels, int activation, const float* input, float* output,
                    int threads) {
    const Norms norms = {rows, channels, 1, activation, threads, {*norm}, {input}};
    return kernels().norm_forward(norms, {}, output);
}

int rk_norm_backward(const rk_norm* norm, int64_t rows, int64_t channels, int activation, const float* input,
                     const float* grad_output, float* grad_input, int threads) {
    const Norms norms = {rows, channels, 1, activation, threads, {*norm}, {input}};
    return kernels().norm_backward(norms, {}, grad_output, &grad_input);
}

// The C interface: picks the instruction set, allocates the workspace, calls the kernels.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
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
#ifdef RK_HAVE_AVX512
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
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

const Candidate* candidates(int* count) {
    static const Candidate list[] = {
#ifdef RK_HAVE_AVX512
        {&rk_kernels_avx512, has_avx512()},
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

const Kernels& kernels() {
    const Kernels* chosen = current.load(std::memory_order_acquire);
    if (!chosen) {
        chosen = find(nullptr);
        current.store(chosen, std::memory_order_release);
    }
    return *chosen;
}

const Algorithm& algorithm(const rk_problem& problem) { return kernels().algorithms[problem.algorithm](); }

size_t round_up(size_t bytes) { return (bytes + 4095) / 4096 * 4096 + 64; }  // + 64: threads differ in cache set

// Makes AddressSanitizer report every access to memory between the workspaces of two threads.
void forbid([[maybe_unused]] char* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(memory, bytes);
#endif
}

}  // namespace

int rk_supports(const rk_problem* problem) {
    return algorithm(*problem).supports(*problem) ? RK_OK : RK_UNSUPPORTED;
}

size_t rk_workspace_bytes(const rk_problem* problem) { return algorithm(*problem).workspace_bytes(*problem); }

size_t rk_spectrum_bytes(const rk_problem* problem) { return algorithm(*problem).spectrum_bytes(*problem); }

static int call(const rk_problem* problem, void* input, float* weight, const void* spectrum, const float* bias,
                void* output, void (*Algorithm::*step)(const Call&)) {
    const Algorithm& chosen = algorithm(*problem);
    if (!chosen.supports(*problem) || !(chosen.*step)) return RK_UNSUPPORTED;
    const size_t used = chosen.workspace_bytes(*problem), stride = round_up(used);
    char* workspace = static_cast<char*>(std::aligned_alloc(64, stride * problem->threads));
    if (!workspace) return RK_OUT_OF_MEMORY;
    for (int t = 0; t < problem->threads; t++) forbid(workspace + t * stride + used, stride - used);
    (chosen.*step)({problem, input, weight, spectrum, bias, output, workspace, stride});
    std::free(workspace);
    return RK_OK;
}

int rk_prepare(const rk_problem* problem, const float* weight, void* spectrum) {
    return call(problem, nullptr, const_cast<float*>(weight), spectrum, nullptr, nullptr, &Algorithm::prepare);
}

int rk_run(const rk_problem* problem, void* input, float* weight, const void* spectrum, const float* bias,
           void* output) {
    return call(problem, input, weight, spectrum, bias, output, &Algorithm::run);
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

int rk_pointwise(const rk_layer* layer, int64_t images, int64_t pixels, const float* input, const float* residual,
                 float* output, int threads) {
    return kernels().pointwise(layer, images, pixels, input, residual, output, threads);
}

int rk_pointwise_pair(const rk_layer* first, const rk_layer* second, int64_t images, int64_t pixels,
                      const float* input, const float* residual, float* output, int threads) {
    return kernels().pointwise_pair(first, second, images, pixels, input, residual, output, threads);
}

// `maps` holds two of the widest map inside a block.
static int run_block(const rk_block& block, int64_t images, int64_t pixels, const float* input, float* output,
                     float* maps, int threads) {
    if (!block.large_kernel)
        return rk_pointwise_pair(&block.first, &block.second, images, pixels, input, input, output, threads);
    float* const convolved = maps + images * pixels * block.first.out_channels;
    int status = rk_pointwise(&block.first, images, pixels, input, nullptr, maps, threads);
    if (!status) status = rk_run(block.large_kernel, maps, block.filters, block.spectra, block.bias, convolved);
    return status ? status : rk_pointwise(&block.second, images, pixels, convolved, input, output, threads);
}

int rk_blocks(const rk_block* blocks, int64_t count, int64_t images, int64_t pixels, const float* input, float* output,
              int threads) {
    int64_t widest = 0;
    for (int64_t i = 0; i < count; i++)
        if (blocks[i].large_kernel) widest = std::max(widest, blocks[i].first.out_channels);
    const size_t bytes = round_up(2 * sizeof(float) * images * pixels * widest);
    float* maps = bytes ? static_cast<float*>(std::aligned_alloc(64, bytes)) : nullptr;
    if (bytes && !maps) return RK_OUT_OF_MEMORY;
    int status = RK_OK;
    for (int64_t i = 0; i < count && !status; i++)
        status = run_block(blocks[i], images, pixels, i ? output : input, output, maps, threads);
    std::free(maps);
    return status;
}

int rk_norm_forward(const rk_norm* norm, const float* input, float* mean, float* variance, float* output) {
    return kernels().norm_forward(norm, input, mean, variance, output);
}

int rk_norm_backward(const rk_norm* norm, const float* input, const float* mean, const float* variance,
                     const float* grad_output, float* grad_input, float* grad_weight, float* grad_bias) {
    return kernels().norm_backward(norm, input, mean, variance, grad_output, grad_input, grad_weight, grad_bias);
}

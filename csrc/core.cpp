// The C interface: picks the instruction set, allocates the workspace, calls the kernels.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

#if defined(RK_HAVE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
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

const Kernels& kernels() {
    const Kernels* chosen = current.load(std::memory_order_acquire);
    if (!chosen) {
        chosen = find(nullptr);
        current.store(chosen, std::memory_order_release);
    }
    return *chosen;
}

size_t round_up(size_t bytes) { return (bytes + 4095) / 4096 * 4096 + 64; }  // + 64: threads differ in cache set

// Makes AddressSanitizer report every access to memory between the workspaces of two threads; `allow` ends that.
void forbid([[maybe_unused]] char* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(memory, bytes);
#endif
}

void allow([[maybe_unused]] char* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
#endif
}

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
};

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

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// A residual block on some images.
struct Block {
    const Core& core;
    const rk_block& layers;
    int64_t images, pixels;
    int threads;

    Products one(const rk_layer& layer) const { return {&layer, nullptr, images, pixels, threads}; }
    Products both() const { return {&layers.first, &layers.second, images, pixels, threads}; }

    bool is_supported() const {
        const rk_problem* kernel = layers.large_kernel;
        return !kernel || core.algorithm(*kernel).supports(*kernel);
    }

    // Of one of the two maps inside.
    size_t map_floats() const { return layers.large_kernel ? images * pixels * layers.first.out_channels : 0; }

    size_t workspace_bytes() const {
        if (!layers.large_kernel) return core.workspace_bytes(both());
        return std::max({core.workspace_bytes(one(layers.first)), core.workspace_bytes(*layers.large_kernel),
                         core.workspace_bytes(one(layers.second))});
    }

    // Adds the time of the large kernel to `seconds`, unless that is null.
    void run(const float* input, float* output, float* maps, char* workspace, double* seconds) const {
        if (!layers.large_kernel) return core.run(both(), input, input, output, workspace);
        float* const convolved = maps + map_floats();
        core.run(one(layers.first), input, nullptr, maps, workspace);
        const double start = seconds ? now() : 0;
        core.run({layers.large_kernel, maps, layers.filters, layers.spectra, layers.bias, convolved, nullptr, 0},
                 &Algorithm::run, workspace);
        if (seconds) *seconds += now() - start;
        core.run(one(layers.second), convolved, input, output, workspace);
    }
};

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

int rk_blocks(const rk_block* blocks, int64_t count, int64_t images, int64_t pixels, const float* input, float* output,
              int threads, double* large_kernel_seconds) {
    const Core core;
    if (large_kernel_seconds) *large_kernel_seconds = 0;
    const auto block = [&](int64_t i) { return Block{core, blocks[i], images, pixels, threads}; };
    size_t map_floats = 0, bytes = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!block(i).is_supported()) return RK_UNSUPPORTED;
        map_floats = std::max(map_floats, block(i).map_floats());
        bytes = std::max(bytes, block(i).workspace_bytes());
    }
    bytes = round_up(bytes);
    const Memory memory(bytes + 2 * map_floats * sizeof(float));
    if (!memory.start) return RK_OUT_OF_MEMORY;
    float* const maps = reinterpret_cast<float*>(memory.start + bytes);
    for (int64_t i = 0; i < count; i++)
        block(i).run(i ? output : input, output, maps, memory.start, large_kernel_seconds);
    return RK_OK;
}

int rk_matmul(const rk_matrix* left, const rk_matrix* right, int64_t rows, int64_t columns, int64_t depth, float* product,
              int threads) {
    const Kernels& isa = kernels();
    if (!isa.matmul) return RK_UNSUPPORTED;
    const MatrixProduct wanted{left, right, rows, columns, depth, threads};
    const Memory workspace(isa.matmul_bytes(wanted));
    if (!workspace.start) return RK_OUT_OF_MEMORY;
    isa.matmul(wanted, product, reinterpret_cast<float*>(workspace.start));
    return RK_OK;
}

int rk_norm_forward(const rk_norm* norm, const float* input, float* mean, float* variance, float* output) {
    return kernels().norm_forward(norm, input, mean, variance, output);
}

int rk_norm_backward(const rk_norm* norm, const float* input, const float* mean, const float* variance,
                     const float* grad_output, float* grad_input, float* grad_weight, float* grad_bias) {
    return kernels().norm_backward(norm, input, mean, variance, grad_output, grad_input, grad_weight, grad_bias);
}

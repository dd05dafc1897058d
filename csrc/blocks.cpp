// Residual blocks for inference, all of a stage in one call.
#include <algorithm>

#include "core.h"

namespace {

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

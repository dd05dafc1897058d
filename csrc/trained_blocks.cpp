// Residual blocks in training, some of them in one call.
#include <algorithm>

#include "core.h"

namespace {

// A 1x1 convolution of rows of pixels: its three passes as products of matrices.
struct Pointwise {
    int64_t rows, in, out;
    const float* weight;  // (out, in)

    template <class Use>
    auto forward(const float* x, Use use) const {
        const rk_matrix left = {x, in, false}, right = {weight, in, true};
        return use(left, right, rows, out, in);
    }
    template <class Use>
    auto to_input(const float* grad, Use use) const {
        const rk_matrix left = {grad, out, false}, right = {weight, in, false};
        return use(left, right, rows, in, out);
    }
    template <class Use>
    auto to_weight(const float* grad, const float* x, Use use) const {
        const rk_matrix left = {grad, out, true}, right = {x, in, false};
        return use(left, right, out, in, rows);
    }
};

enum { kBefore, kFirst, kLarge, kSmall, kSecond };  // which batch norm

struct Branch {
    const Core core;
    const rk_branch& b;
    const Pointwise first, second;
    const int64_t narrow, wide;  // floats of a map
    // Maps of a forward pass, in front of each but the last what makes the next.
    float *const normalized, *const projected, *const activated, *const large, *const small, *const inside, *const last;
    char* workspace = nullptr;

    explicit Branch(const rk_branch& branch)
        : b(branch),
          first{b.rows, b.channels, b.width, b.first},
          second{b.rows, b.width, b.channels, b.second},
          narrow(line(b.rows * b.channels)),
          wide(line(b.rows * b.width)),
          normalized(b.maps),
          projected(normalized + narrow),
          activated(projected + wide),
          large(activated + (b.large ? wide : 0)),
          small(large + (b.small ? wide : 0)),
          inside(small + (b.large ? wide : 0)),
          last(inside + wide) {}

    static int64_t line(int64_t floats) { return (floats + 15) / 16 * 16; }
    int64_t map_floats() const { return 2 * narrow + (b.small ? 5 : b.large ? 4 : 2) * wide; }

    template <class Use>
    void each_depthwise(Use use) const {
        for (const rk_depthwise* kernel : {b.large, b.small})
            if (kernel) use(*kernel);
    }

    bool is_supported() const {
        bool supported = true;
        each_depthwise([&](const rk_depthwise& kernel) {
            for (const rk_problem* pass : {kernel.forward, kernel.grad_input, kernel.grad_weight})
                supported = supported && core.algorithm(*pass).supports(*pass);
        });
        return supported;
    }

    size_t workspace_bytes() const {
        const auto bytes = [&](const rk_matrix& left, const rk_matrix& right, int64_t rows, int64_t columns, int64_t depth) {
            return core.workspace_bytes(MatrixProduct{&left, &right, rows, columns, depth, b.threads});
        };
        size_t most = 0;
        for (const Pointwise& layer : {first, second})
            most = std::max({most, layer.forward(nullptr, bytes), layer.to_input(nullptr, bytes),
                             layer.to_weight(nullptr, nullptr, bytes)});
        each_depthwise([&](const rk_depthwise& kernel) {
            for (const rk_problem* pass : {kernel.forward, kernel.grad_input, kernel.grad_weight})
                most = std::max(most, core.workspace_bytes(*pass));
        });
        return round_up(most);
    }

    template <class Run>
    void timed(int kind, Run run) const {
        const double start = b.seconds ? now() : 0;
        run();
        if (b.seconds) b.seconds[kind] += now() - start;
    }

    auto product(float* output) const {
        return [this, output](const rk_matrix& left, const rk_matrix& right, int64_t rows, int64_t columns, int64_t depth) {
            timed(RK_PRODUCTS, [&] {
                core.run(MatrixProduct{&left, &right, rows, columns, depth, b.threads}, output, workspace);
            });
        };
    }

    void convolve(int kind, const rk_problem* pass, float* input, float* weight, float* output) const {
        timed(kind, [&] {
            core.run({pass, input, weight, nullptr, nullptr, output, nullptr, 0}, &Algorithm::run, workspace);
        });
    }

    int normalize(const Norms& norms, const Residual& after, float* output) const {
        int status;
        timed(RK_NORMS, [&] { status = core.isa.norm_forward(norms, after, output); });
        return status;
    }

    int differentiate(const Norms& norms, const Residual& after, const float* grad_output, float* const* grad_input) const {
        int status;
        timed(RK_NORMS, [&] { status = core.isa.norm_backward(norms, after, grad_output, grad_input); });
        return status;
    }

    // One norm or the sum of two, from the one called `which` on.
    Norms norms(int which, int count, int64_t channels, int activation, const float* x, const float* other = nullptr) const {
        Norms norms = {b.rows, channels, count, activation, b.threads, {b.norms[which]}, {x, other}};
        if (count == 2) norms.norm[1] = b.norms[which + 1];
        return norms;
    }
    Norms before() const { return norms(kBefore, 1, b.channels, RK_IDENTITY, b.input); }
    Norms after_first() const { return norms(kFirst, 1, b.width, b.activation, projected); }
    Norms after_large() const { return norms(kLarge, b.small ? 2 : 1, b.width, RK_RELU, large, small); }
    Norms after_second() const { return norms(kSecond, 1, b.channels, RK_IDENTITY, last); }

    Residual residual(const float* x) const { return {x, b.image_scales, b.rows / b.images}; }

    int forward() const {
        if (const int status = normalize(before(), {}, normalized)) return status;
        first.forward(normalized, product(projected));
        if (const int status = normalize(after_first(), {}, activated)) return status;
        if (b.large) {
            convolve(RK_LARGE, b.large->forward, activated, const_cast<float*>(b.large->weight), large);
            if (b.small) convolve(RK_SMALL, b.small->forward, activated, const_cast<float*>(b.small->weight), small);
            if (const int status = normalize(after_large(), {}, inside)) return status;
        }
        second.forward(inside, product(last));
        return normalize(after_second(), residual(b.input), b.output);
    }

    // `grad_input` may be grad_output. `maps`: a narrow one, then wide ones.
    int backward(const float* grad_output, float* grad_input, float* maps) const {
        float *const grad_narrow = maps, *const grad_inside = grad_narrow + narrow;
        if (const int status = differentiate(after_second(), residual(nullptr), grad_output, &grad_narrow)) return status;
        second.to_weight(grad_narrow, inside, product(b.grad_second));
        second.to_input(grad_narrow, product(grad_inside));
        float* grad_wide = grad_inside;
        if (b.large) {
            float* const grads[] = {grad_inside, grad_inside + wide};
            grad_wide = grads[1] + wide;
            if (const int status = differentiate(after_large(), {}, grad_inside, grads)) return status;
            differentiate(RK_LARGE, *b.large, grads[0], grad_wide);
            if (b.small) {
                differentiate(RK_SMALL, *b.small, grads[1], grad_inside);
                add(grad_inside, grad_wide);
            }
        }
        if (const int status = differentiate(after_first(), {}, grad_wide, &grad_wide)) return status;
        first.to_weight(grad_wide, normalized, product(b.grad_first));
        first.to_input(grad_wide, product(grad_narrow));
        return differentiate(before(), {grad_output, nullptr, 0}, grad_narrow, &grad_input);
    }
    int64_t gradient_floats() const { return narrow + (b.large ? 3 : 1) * wide; }

    void differentiate(int kind, const rk_depthwise& kernel, float* grad, float* grad_input) const {
        convolve(kind, kernel.grad_weight, activated, kernel.weight_gradient, grad);
        convolve(kind, kernel.grad_input, grad_input, const_cast<float*>(kernel.weight), grad);
    }

    void add(const float* from, float* to) const {
#pragma omp parallel for num_threads(b.threads)
        for (int64_t i = 0; i < wide; i++) to[i] += from[i];
    }
};

}  // namespace

int64_t rk_branch_map_floats(const rk_branch* branch) { return Branch(*branch).map_floats(); }

int rk_branches_forward(const rk_branch* branches, int64_t count) {
    size_t bytes = 0;
    for (int64_t i = 0; i < count; i++) {
        const Branch branch(branches[i]);
        if (!branch.is_supported()) return RK_UNSUPPORTED;
        bytes = std::max(bytes, branch.workspace_bytes());
    }
    const Memory workspace(bytes);
    if (!workspace.start) return RK_OUT_OF_MEMORY;
    for (int64_t i = 0; i < count; i++) {
        Branch branch(branches[i]);
        branch.workspace = workspace.start;
        if (const int status = branch.forward()) return status;
    }
    return RK_OK;
}

int rk_branches_backward(const rk_branch* branches, int64_t count, const float* grad_output, float* grad_input) {
    size_t bytes = 0, floats = 0;
    for (int64_t i = 0; i < count; i++) {
        const Branch branch(branches[i]);
        if (!branch.is_supported()) return RK_UNSUPPORTED;
        bytes = std::max(bytes, branch.workspace_bytes());
        floats = std::max(floats, size_t(branch.gradient_floats()));
    }
    const Memory memory(bytes + floats * sizeof(float));
    if (!memory.start) return RK_OUT_OF_MEMORY;
    for (int64_t i = count - 1; i >= 0; i--) {
        Branch branch(branches[i]);
        branch.workspace = memory.start;
        float* const maps = reinterpret_cast<float*>(memory.start + bytes);
        if (const int status = branch.backward(i + 1 < count ? grad_input : grad_output, grad_input, maps)) return status;
    }
    return RK_OK;
}

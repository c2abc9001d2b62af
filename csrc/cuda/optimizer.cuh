/* What the optimizers' launchers share: the kernel that advances steps, and the choice of a kernel by how parameters
are kept.

The first launch of a step advances each tensor's step count and turns it into the rule's constants, one thread for a
tensor: powers in fp64, which thousands of blocks need not repeat, and no block can read a step that another has already
advanced. found_inf is read by every kernel, on the device: nothing is written where it is not zero. */
#pragma once

#include "../rules/adafactor.h"
#include "../rules/adam.h"
#include "../rules/sgd.h"
#include "launch.h"
#include "multi_tensor.cuh"
#include "parameter.h"

namespace fastlm {

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

struct Steps {
    static constexpr int CAPACITY = (ARGUMENT_BYTES - 4 * OTHER_ARGUMENT_BYTES - 8) / 16;
    int tensors;
    float* step[CAPACITY];
    uint64_t key[CAPACITY];
};

struct Flags {  // fp32 scalars on the device, or null
    const float *coefficient, *found_inf;

    __device__ bool skip() const { return found_inf && *found_inf != 0.0f; }
    __device__ float factor() const { return coefficient ? *coefficient : 1.0f; }
};

template <typename Rule, typename Options>
__global__ void __launch_bounds__(THREADS)
    advance(const __grid_constant__ Steps steps, const Options options, const Flags flags, Now<Rule>* now) {
    const int t = blockIdx.x * THREADS + threadIdx.x;
    if (t >= steps.tensors || flags.skip()) return;
    const float step = *steps.step[t] + 1.0f;
    *steps.step[t] = step;
    now[t] = {make_rule(step, options), uint32_t(step), steps.key[t]};
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

static inline void check_workspace(Address workspace, const Sizes& sizes) {
    check(workspace != 0 || sizes.empty(), "workspace is null");
}

template <typename Rule, typename Options>
void launch_advance(const Parameters& p, const Addresses& addresses, const Options& options, const Flags& flags,
    Now<Rule>* now, cudaStream_t stream) {
    Steps steps;
    for (size_t begin = 0; begin < addresses.size(); begin += Steps::CAPACITY) {
        steps.tensors = int(std::min<size_t>(Steps::CAPACITY, addresses.size() - begin));
        for (int t = 0; t < steps.tensors; t++) {
            steps.step[t] = reinterpret_cast<float*>(addresses[begin + t]);
            steps.key[t] = p.keys.empty() ? 0 : uint64_t(p.keys[begin + t]);
        }
        advance<Rule>
            <<<(steps.tensors + THREADS - 1) / THREADS, THREADS, 0, stream>>>(steps, options, flags, now + begin);
        check(cudaGetLastError(), "launch advance");
    }
}

static inline Flags flags_at(Address coefficient, Address found_inf) {
    return {reinterpret_cast<const float*>(coefficient), reinterpret_cast<const float*>(found_inf)};
}

// Launch RULE<how p is kept>{arguments…} over p, its companions if it has any, and the other lists.
template <template <Kept> class RULE, int OTHERS, typename... Arguments>
void launch_kept(const char* name, const Parameters& p, const Tensors* const (&others)[OTHERS], const Sizes& sizes,
    cudaStream_t stream, const Arguments&... arguments) {
    if (p.companions.empty()) {
        const Tensors* lists[1 + OTHERS] = {&p.stored};
        std::copy(others, others + OTHERS, lists + 1);
        if (p.keys.empty()) launch(name, lists, sizes, RULE<OWN>{arguments...}, stream);
        else launch(name, lists, sizes, RULE<NOISE>{arguments...}, stream);
    } else {
        const Tensors* lists[2 + OTHERS] = {&p.stored, &p.companions};
        std::copy(others, others + OTHERS, lists + 2);
        launch(name, lists, sizes, RULE<COMPANION>{arguments...}, stream);
    }
}

}  // namespace fastlm

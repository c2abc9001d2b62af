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

static inline Flags flags_of(const Update& update) {
    return {reinterpret_cast<const float*>(update.coefficient), reinterpret_cast<const float*>(update.found_inf)};
}

// t ← t + 1 for every tensor, and its rule's constants at that step.
template <typename Rule, typename Options>
void launch_advance(const Update& update, const Options& options, Now<Rule>* now, cudaStream_t stream) {
    const Flags flags = flags_of(update);
    const size_t tensors = update.steps.size();
    Steps steps;
    for (size_t begin = 0; begin < tensors; begin += Steps::CAPACITY) {
        steps.tensors = int(std::min<size_t>(Steps::CAPACITY, tensors - begin));
        for (int t = 0; t < steps.tensors; t++) {
            steps.step[t] = reinterpret_cast<float*>(update.steps[begin + t]);
            steps.key[t] = update.keys.empty() ? 0 : uint64_t(update.keys[begin + t]);
        }
        const int blocks = (steps.tensors + THREADS - 1) / THREADS;
        advance<Rule><<<blocks, THREADS, 0, stream>>>(steps, options, flags, now + begin);
        check(cudaGetLastError(), "launch advance");
    }
}

// Launch RULE<how parameters are kept>{arguments…} over parameters, their masters if they have any, and other lists.
// OWN_DTYPES and so on: mixes that have kernels of their own.
template <template <Precision> class RULE, typename OWN_DTYPES = Known<>, typename STOCHASTIC_DTYPES = Known<>,
    typename MASTER_DTYPES = Known<>, int OTHERS, typename... Arguments>
void launch_kept(const char* name, const Update& update, const Tensors* const (&others)[OTHERS], const Sizes& sizes,
    cudaStream_t stream, const Arguments&... arguments) {
    if (update.masters.empty()) {
        const Tensors* lists[1 + OTHERS] = {&update.params};
        std::copy(others, others + OTHERS, lists + 1);
        if (update.keys.empty()) launch(name, lists, sizes, RULE<OWN>{arguments...}, stream, OWN_DTYPES());
        else launch(name, lists, sizes, RULE<STOCHASTIC>{arguments...}, stream, STOCHASTIC_DTYPES());
    } else {
        const Tensors* lists[2 + OTHERS] = {&update.params, &update.masters};
        std::copy(others, others + OTHERS, lists + 2);
        launch(name, lists, sizes, RULE<MASTER>{arguments...}, stream, MASTER_DTYPES());
    }
}

}  // namespace fastlm

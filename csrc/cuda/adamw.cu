/*
AdamW over lists of tensors: 28 bytes an element in fp32, so memory is the limit and arithmetic is not.

Two kinds of launch. The first advances each tensor's step and turns it into the rule's constants, one thread for a tensor: two
powers in fp64, which thousands of blocks need not repeat, and no block can read a step that another has already advanced. The
second applies the rule to chunks. found_inf is read by both, on the device: nothing is written where it is not zero.
*/
#include "../rules/adamw.h"
#include "launch.h"
#include "multi_tensor.cuh"

namespace fastlm {

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

struct Steps {
    static constexpr int CAPACITY = (ARGUMENT_BYTES - OTHER_ARGUMENT_BYTES - 8) / 8;
    int tensors;
    float* step[CAPACITY];
};

struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
    bool bias_correction;
};

__global__ void __launch_bounds__(THREADS) advance(const __grid_constant__ Steps steps, const Hyper h, const float* found_inf, AdamW* rules) {
    const int t = blockIdx.x * THREADS + threadIdx.x;
    if (t >= steps.tensors || (found_inf && *found_inf != 0.0f)) return;
    const float step = *steps.step[t] + 1.0f;
    *steps.step[t] = step;
    rules[t] = make_adamw(step, h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, h.bias_correction);
}

struct ApplyAdamW {
    const AdamW* rules;  // one for each tensor
    const float *coefficient, *found_inf;

    __device__ void operator()(const Chunk<4>& chunk) const {
        if (found_inf && *found_inf != 0.0f) return;
        const float factor = coefficient ? *coefficient : 1.0f;
        const AdamW rule = rules[chunk.tensor];
        map<0b1101, 1>(chunk, threadIdx.x, [&](float (&x)[4][VECTOR]) {  // p, g, m, v, of which g is only read
#pragma unroll
            for (int e = 0; e < VECTOR; e++) adamw(x[0][e], factor * x[1][e], x[2][e], x[3][e], rule);
        });
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

int64_t adamw_workspace(int64_t tensors) { return tensors * int64_t(sizeof(AdamW)); }

void launch_adamw(const Tensors& p, const Tensors& g, const Tensors& m, const Tensors& v, const std::vector<Address>& addresses, const Sizes& sizes,
                  Address coefficient, Address found_inf, double lr, double beta1, double beta2, double eps, double weight_decay,
                  bool bias_correction, Address workspace, int device, Address stream) {
    check_list("params", p, sizes), check_list("grads", g, sizes), check_list("exp_avgs", m, sizes), check_list("exp_avg_sqs", v, sizes);
    check(addresses.size() == sizes.size(), "steps and params differ in number");
    if (sizes.empty()) return;
    check(workspace != 0, "workspace is null");
    for (Address step : addresses) check(step != 0, "steps holds a null address");
    const OnDevice on(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    const auto skip = reinterpret_cast<const float*>(found_inf);
    const auto rules = reinterpret_cast<AdamW*>(workspace);
    const Hyper hyper{lr, beta1, beta2, eps, weight_decay, bias_correction};
    Steps steps;
    for (size_t begin = 0; begin < addresses.size(); begin += Steps::CAPACITY) {
        steps.tensors = int(std::min<size_t>(Steps::CAPACITY, addresses.size() - begin));
        for (int t = 0; t < steps.tensors; t++) steps.step[t] = reinterpret_cast<float*>(addresses[begin + t]);
        advance<<<(steps.tensors + THREADS - 1) / THREADS, THREADS, 0, queue>>>(steps, hyper, skip, rules + begin);
        check(cudaGetLastError(), "launch adamw");
    }
    launch("adamw", {&p, &g, &m, &v}, sizes, ApplyAdamW{rules, reinterpret_cast<const float*>(coefficient), skip}, queue);
}

}  // namespace fastlm

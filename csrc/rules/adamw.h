/*
AdamW for one element (Loshchilov & Hutter 2019, algorithm 2), the one source for CPU and GPU.

    θ ← θ - η λ θ
    m ← m + (1 - β₁)(g - m)        v ← β₂ v + (1 - β₂) g²
    θ ← θ - η/(1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

in fp32, in this order, which is torch.optim.AdamW's. What depends only on the step is computed once per tensor, in fp64, as
reciprocals: a division costs a CPU as much as the rest, and one of the two that torch makes is saved.
*/
#pragma once

#include <cmath>

#include "numeric.h"

namespace fastlm {

struct AdamW {
    float decay;         // 1 - η λ
    float one_beta1;     // 1 - β₁
    float beta2;
    float one_beta2;     // 1 - β₂
    float step_size;     // η / (1 - β₁ᵗ)
    float root_scale;    // 1 / √(1 - β₂ᵗ)
    float eps;
};

// step: the number of this update, from 1. bias_correction = false is Google's BERT variant.
FASTLM_RULE AdamW make_adamw(double step, double lr, double beta1, double beta2, double eps, double weight_decay, bool bias_correction) {
    const double bias1 = bias_correction ? 1.0 - pow(beta1, step) : 1.0;
    const double bias2 = bias_correction ? 1.0 - pow(beta2, step) : 1.0;
    return {float(1.0 - lr * weight_decay), float(1.0 - beta1), float(beta2), float(1.0 - beta2), float(lr / bias1), float(1.0 / sqrt(bias2)), float(eps)};
}

FASTLM_RULE void adamw(float& p, float g, float& m, float& v, const AdamW& c) {
    p *= c.decay;
    m += c.one_beta1 * (g - m);
    v = c.beta2 * v + c.one_beta2 * (g * g);
    p -= c.step_size * (m / (sqrtf(v) * c.root_scale + c.eps));
}

}  // namespace fastlm

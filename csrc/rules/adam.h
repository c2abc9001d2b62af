/* Adam's family for one element, the one source for CPU and GPU: Adam (Kingma & Ba 2015), AdamW (Loshchilov & Hutter
2019) and LAMB (You et al. 2020), whose direction is AdamW's and whose step is scaled, tensor by tensor, by a trust
ratio. AdamW is LAMB with ratio 1.

    g ← g + λ₂ θ                                    Adam's weight decay, an L2 penalty; 0 for the others
    m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²
    θ ← (1 - η ratio λ) θ - η ratio k · a m / (s √v + ε)

in fp32, in this order, which is torch.optim.AdamW's but for m: of m + (1 - β₁)(g - m), which torch takes where β₁ >
1/2, a small g is lost beside a large m. Bias correction is in a = 1/(1 - β₁ᵗ) and s = 1/√(1 - β₂ᵗ); DeepSpeed puts it
into the step instead, k = √(1 - β₂ᵗ)/(1 - β₁ᵗ), which then scales the decay too; Google's BERT and ALBERT have none.
nanoT5's decay comes last, θ ← (1 - η λ)(θ - …), so its factor joins the step's. What depends only on the step is
computed once per tensor, in fp64, as reciprocals: a division costs a CPU as much as the rest, and one of the two that
torch makes is saved. */
#pragma once

#include <cmath>

#include "numeric.h"

namespace fastlm {

// fastlm/ops/optim/adamw.py: CORRECTIONS
enum Correction : int { UNCORRECTED = 0, CORRECT_MOMENTS = 1, CORRECT_STEP = 2 };

struct AdamOptions {
    double lr, beta1, beta2, eps, weight_decay;
    int correction;
    bool decoupled;  // weight_decay is AdamW's, not Adam's
};

struct Adam {
    float l2;  // λ₂
    float decay;  // 1 - η ratio λ
    float beta1, one_beta1;  // β₁, 1 - β₁
    float beta2, one_beta2;
    float step_size;  // η ratio k a
    float root_scale;  // s
    float eps;
    float lr, rate, r_scale, r_decay;  // η, η k; LAMB's direction is r_scale · m / (s √v + ε) + r_decay · θ
};

// step: the number of this update, from 1.
FASTLM_RULE Adam make_rule(double step, const AdamOptions& o) {
    const double bias1 = o.correction == UNCORRECTED ? 1.0 : 1.0 - pow(o.beta1, step);
    const double bias2 = o.correction == UNCORRECTED ? 1.0 : 1.0 - pow(o.beta2, step);
    const bool moments = o.correction == CORRECT_MOMENTS;
    const double decay = o.decoupled ? o.weight_decay : 0.0;
    const double k = moments ? 1.0 : sqrt(bias2) / bias1, a = moments ? 1.0 / bias1 : 1.0,
                 s = moments ? 1.0 / sqrt(bias2) : 1.0;
    return {float(o.weight_decay - decay), float(1.0 - o.lr * k * decay), float(o.beta1), float(1.0 - o.beta1),
        float(o.beta2), float(1.0 - o.beta2), float(o.lr * k * a), float(s), float(o.eps), float(o.lr), float(o.lr * k),
        float(a), float(decay)};
}

FASTLM_RULE void adam_moments(float p, float g, float& m, float& v, const Adam& c) {
    g += c.l2 * p;
    m = c.beta1 * m + c.one_beta1 * g;
    v = c.beta2 * v + c.one_beta2 * (g * g);
}

FASTLM_RULE float adam_direction(float m, float v, const Adam& c) { return m / (sqrtf(v) * c.root_scale + c.eps); }

FASTLM_RULE float adam_apply(float p, float m, float v, const Adam& c) {
    return p * c.decay - c.step_size * adam_direction(m, v, c);
}

FASTLM_RULE void adam(float& p, float g, float& m, float& v, const Adam& c) {
    adam_moments(p, g, m, v, c);
    p = adam_apply(p, m, v, c);
}

// ---------------------------------------------------------------------------------------------------------------------
// The ratio of one tensor

struct RatioOptions {
    bool adapt;  // false: the ratio is 1
    bool rms;  // AdamWScale of nanoT5: max(low, RMS(θ)); the decay comes last and is of η alone
    double norm_low, norm_high;  // φ of LAMB's paper: bounds of ‖θ‖
    double low, high;  // bounds of the ratio
};

// c for a tensor of n elements with Σ θ² and Σ r², r = r_scale · direction + r_decay · θ.
FASTLM_RULE Adam with_ratio(Adam c, double p_squares, double r_squares, double n, const RatioOptions& o) {
    if (!o.adapt) return c;
    double ratio = 1.0;
    if (o.rms) {
        const double decay = 1.0 - double(c.lr) * c.r_decay;
        c.decay = float(decay);
        ratio = decay * clip(sqrt(p_squares / n), o.low, o.high);  // the step, too, decays
    } else {
        const double norm = clip(sqrt(p_squares), o.norm_low, o.norm_high), r = sqrt(r_squares);
        if (norm > 0.0 && r > 0.0) ratio = clip(norm / r, o.low, o.high);
        c.decay = float(1.0 - ratio * c.rate * c.r_decay);
    }
    c.step_size = float(ratio * c.step_size);
    return c;
}

}  // namespace fastlm

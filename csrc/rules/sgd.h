/*
SGD with momentum for one element (Sutskever et al. 2013, as torch.optim.SGD has it), the one source for CPU and GPU.

    g ← g + λ θ        b ← μ b + (1 - damping) g, b ← g at the first step        θ ← θ - η (nesterov ? g + μ b : b)

η outside the momentum: a change of η acts at once on what is remembered.
*/
#pragma once

#include "numeric.h"

namespace fastlm {

struct SgdOptions {
    double lr, momentum, dampening, weight_decay;
    bool nesterov;
};

struct Sgd {
    float lr, l2;
    float keep, take;      // b ← keep b + take g
    float gradient, buffer;  // θ ← θ - lr (gradient g + buffer b)
};

FASTLM_RULE Sgd make_rule(double step, const SgdOptions& o) {
    const bool first = step == 1.0;
    const float keep = float(first ? 0.0 : o.momentum), take = float(first ? 1.0 : 1.0 - o.dampening);
    return {float(o.lr), float(o.weight_decay), keep, take, o.nesterov ? 1.0f : 0.0f,
        o.nesterov ? float(o.momentum) : 1.0f};
}

FASTLM_RULE void sgd(float& p, float g, float& b, const Sgd& c) {
    g += c.l2 * p;
    b = c.keep * b + c.take * g;
    p -= c.lr * (c.gradient * g + c.buffer * b);
}

FASTLM_RULE void sgd(float& p, float g, const Sgd& c) { p -= c.lr * (g + c.l2 * p); }  // momentum 0: no buffer

}  // namespace fastlm

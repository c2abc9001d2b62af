/* Adafactor (Shazeer & Stern 2018): what one element, one row, one column and one tensor contribute, the one source for
CPU and GPU.

For a matrix G [n, m], with row means R and column means C of its squares,

    R ← β R + (1 - β)(mean_j G² + ε₁)      C ← β C + (1 - β)(mean_i G² + ε₁)      β = 1 - (t - offset)^-0.8
    U_ij = G_ij · min(a_i b_j, 1/ε)        a_i = √(mean(R) / R_i), b_j = 1/√C_j
    θ ← decay · θ - α U / max(1, RMS(U)/d)      α = ρ · max(ε₂, RMS(θ))

The paper, T5 and Hugging Face add ε₁ to G²; torch adds nothing and bounds the estimate instead, V ≥ ε² and mean(R) ≥ ε,
which the minimum above says exactly, because 1/√ falls. Elsewhere 1/ε is infinite.

Two passes over G are enough. R_i is known as soon as row i was read, so the first pass can gather Σ_i G_ij² and also
Σ_i G_ij²/R_i, and

    n m RMS(U)² = mean(R) Σ_j (Σ_i G_ij²/R_i) / C_j

is exact when the pass ends, unless the minimum takes the right-hand side somewhere: that can be excluded from the
smallest R and C alone, of rows and columns that have a gradient, and only a matrix where it cannot is read once more. A
tensor that is not factored keeps V = β V + (1 - β)(G² + ε₁). */
#pragma once

#include <cmath>

#include "numeric.h"

namespace fastlm {

struct AdafactorOptions {
    double lr;  // the step ρ, or with relative_step its bound
    bool relative_step;  // ρ = min(lr, ramp · t, 1/√t)
    double ramp;
    double decay_rate, decay_offset;
    double eps_square, eps_bound, eps_scale;  // ε₁, ε, ε₂
    bool scale_parameter;  // α = ρ · max(ε₂, RMS(θ)), else α = ρ · scale
    double scale;
    double clip_threshold, beta1, weight_decay;
    bool decay_by_step;  // θ decays by weight_decay · α, else by weight_decay · lr
};

struct Adafactor {
    float beta2, one_beta2, eps_square;
    float bound;  // 1/ε
    float beta1, one_beta1;
    float decay, step_size;  // known after the first pass
    bool scaled;  // whether Σ θ² is wanted
};

FASTLM_RULE Adafactor make_rule(double step, const AdafactorOptions& o) {
    const double t = fmax(step - o.decay_offset, 1.0), one_beta2 = pow(t, -o.decay_rate);
    return {float(1.0 - one_beta2), float(one_beta2), float(o.eps_square),
        o.eps_bound > 0.0 ? float(1.0 / o.eps_bound) : HUGE_VALF, float(o.beta1), float(1.0 - o.beta1), 1.0f, 0.0f,
        o.scale_parameter};
}

// Fill in what follows from Σ θ² and Σ U² over the n elements of a tensor.
FASTLM_RULE void finish_adafactor(
    Adafactor& c, double step, double p_squares, double u_squares, double n, const AdafactorOptions& o) {
    const double rho = o.relative_step ? fmin(fmin(o.lr, o.ramp * step), 1.0 / sqrt(step)) : o.lr;
    const double alpha = rho * (o.scale_parameter ? clip(sqrt(p_squares / n), o.eps_scale, HUGE_VAL) : o.scale);
    const double rms = sqrt(u_squares / n) / o.clip_threshold;
    c.decay = float(1.0 - o.weight_decay * (o.decay_by_step ? alpha : o.lr));
    c.step_size = float(rms > 1.0 ? alpha / rms : rms <= 1.0 ? alpha : rms);  // NaN stays NaN
}

// The mean of R that divides the estimate, never below torch's ε.
FASTLM_RULE double mean_of_rows(double sum, double rows, const AdafactorOptions& o) {
    const double mean = sum / rows;
    return mean < o.eps_bound ? o.eps_bound : mean;
}

// Whether V = R_i C_j / mean(R) may lie below ε² somewhere.
FASTLM_RULE bool may_bind(double smallest_row, double smallest_column, double mean, const AdafactorOptions& o) {
    return o.eps_bound > 0.0 && !(smallest_row * smallest_column >= o.eps_bound * o.eps_bound * mean);
}

FASTLM_RULE float ema(float old, float x, const Adafactor& c) {
    return c.beta2 * old + c.one_beta2 * (x + c.eps_square);
}

FASTLM_RULE float factored_rate(float a, float b, const Adafactor& c) {
    const float rate = a * b;
    return rate > c.bound ? c.bound : rate;
}

}  // namespace fastlm

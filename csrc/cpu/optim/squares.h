// Sums of squares, of which norms are made.
#pragma once

#include "../vector.h"

namespace fastlm {
namespace FASTLM_ISA {

// Σ (factor x)² of at most BLOCK elements: 64 sums side by side in fp32, where no square can overflow, nor underflow by
// more than rounding; else in fp64. They stay in registers: a vector type wider than those would live in memory.
static inline double squares(const float* x, int n, float factor = 1.0f) {
    constexpr int ACROSS = 64, FOLDED = ACROSS / 4;
    V s[ACROSS / W] = {};
    int i = 0;
    for (; i + ACROSS <= n; i += ACROSS) {
        for (int l = 0; l < ACROSS; l += 16) __builtin_prefetch(x + i + 3072 + l);
        for (int l = 0; l < ACROSS / W; l++) {
            const V a = load(x + i + l * W) * factor;
            s[l] += a * a;
        }
    }
    float all[ACROSS], sums[FOLDED];
    for (int l = 0; l < ACROSS / W; l++) store(all + l * W, s[l]);
    for (int l = 0; l < FOLDED; l++) sums[l] = (all[l] + all[l + FOLDED]) + (all[l + 2 * FOLDED] + all[l + 3 * FOLDED]);
    for (; i < n; i++) sums[i % FOLDED] += (factor * x[i]) * (factor * x[i]);
    for (int half = FOLDED / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) sums[l] += sums[l + half];
    if (sums[0] > 0x1p-60f && sums[0] < 0x1p127f) return double(sums[0]);
    double wide = 0.0;  // too small, too large, inf or NaN
    for (int k = 0; k < n; k++) wide += (double(factor) * double(x[k])) * (double(factor) * double(x[k]));
    return wide;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm

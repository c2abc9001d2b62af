// Sums of squares, of which norms are made.
#pragma once

#include "../vector.h"

namespace fastlm {
namespace FASTLM_ISA {

// Whether a sum of squares in fp32 is right: no square overflowed, nor underflowed by more than rounding.
static inline bool in_range(float sum) { return sum > 0x1p-60f && sum < 0x1p127f; }

// Σ (factor x)² in fp64, where it is not.
static inline double wide_squares(const float* x, int n, float factor) {
    double wide = 0.0;
    for (int k = 0; k < n; k++) wide += (double(factor) * double(x[k])) * (double(factor) * double(x[k]));
    return wide;
}

constexpr int LANES = 16;  // of sums side by side, whatever the registers hold

static inline float folded(float (&sums)[LANES]) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) sums[l] += sums[l + half];
    return sums[0];
}

// Σ (factor x)² of at most BLOCK elements: 64 sums side by side in fp32. They stay in registers: a vector type wider
// than those would live in memory.
static inline double squares(const float* x, int n, float factor = 1.0f) {
    constexpr int ACROSS = 4 * LANES;
    V s[ACROSS / W] = {};
    int i = 0;
    for (; i + ACROSS <= n; i += ACROSS) {
        for (int l = 0; l < ACROSS; l += 16) __builtin_prefetch(x + i + 3072 + l);
        for (int l = 0; l < ACROSS / W; l++) {
            const V a = load(x + i + l * W) * factor;
            s[l] += a * a;
        }
    }
    float all[ACROSS], sums[LANES];
    for (int l = 0; l < ACROSS / W; l++) store(all + l * W, s[l]);
    for (int l = 0; l < LANES; l++) sums[l] = (all[l] + all[l + LANES]) + (all[l + 2 * LANES] + all[l + 3 * LANES]);
    for (; i < n; i++) sums[i % LANES] += (factor * x[i]) * (factor * x[i]);
    const float sum = folded(sums);
    return in_range(sum) ? double(sum) : wide_squares(x, n, factor);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm

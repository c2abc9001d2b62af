// The arithmetic of unscale.cu, host and device code: tests run it on the host.
#pragma once

#include <cmath>

#include "batch.h"

namespace fastlm {

// Σ x² of one vector: in fp32 where no square can overflow, nor underflow by more than rounding, else in fp64.
FASTLM_RULE double sum_of_squares(const float (&x)[VECTOR]) {
    const float sum = fmaf(x[0], x[0], x[1] * x[1]) + fmaf(x[2], x[2], x[3] * x[3]);
    if (sum > 0x1p-60f && sum < 0x1p127f) return double(sum);
    double wide = 0.0;  // too small, too large, inf or NaN
    for (int e = 0; e < VECTOR; e++) wide += double(x[e]) * double(x[e]);
    return wide;
}

// stats: [norm of g / scale, the factor that unscales and clips, whether the norm is not finite], from Σ g².
FASTLM_RULE void write_stats(double sum, float scale, double max_norm, float* stats) {
    const double unscale = 1.0 / scale;
    const float norm = float(sqrt(sum) * unscale);
    const double clip = max_norm / (double(norm) + 1e-6);
    stats[0] = norm;
    stats[1] = float(max_norm > 0.0 && !(clip > 1.0) ? unscale * clip : unscale);
    stats[2] = (as_bits(norm) & 0x7f800000u) == 0x7f800000u ? 1.0f : 0.0f;
}

}  // namespace fastlm

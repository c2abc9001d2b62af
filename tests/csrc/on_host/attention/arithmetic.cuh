// In place of csrc/cuda/attention/arithmetic.cuh.
#pragma once

#include <cmath>

#include "../../rules/numeric.h"

namespace fastlm {

inline float exp2_approximate(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

template <typename T>
uint32_t pack(float low, float high) {
    T l, h;
    narrow(low, l);
    narrow(high, h);
    return l.bits | uint32_t(h.bits) << 16;
}

}  // namespace fastlm

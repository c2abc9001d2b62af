/* Arithmetic that C++ has no word for.

PTX ISA, "Floating Point Instructions": ex2; "Data Movement and Conversion Instructions": cvt. */
#pragma once

#include "../../rules/numeric.h"

namespace fastlm {

// 2^x to 2 ulp; results below the least normal number are 0
static __device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers T, rounded to nearest, the first in the low half.
template <typename T>
static __device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
    uint32_t two;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    uint32_t two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}

}  // namespace fastlm

/*
Numbers that host and device share: the 16-bit floats and how they round.

Everything is `static`: a file compiled for AVX-512 must not lend its code to one compiled for every x86-64, which is
what the linker does with two copies of an ordinary inline function.
*/
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTLM_RULE static __host__ __device__ __forceinline__
#else
#define FASTLM_RULE static inline
#endif

namespace fastlm {

// fastlm/backends/native.py: DTYPES
enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2, I16 = 3 };  // I16: only the remainders of bf16 parameters

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

FASTLM_RULE int element_size(int dtype) { return dtype == F32 ? 4 : 2; }  // bytes

FASTLM_RULE uint32_t as_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
FASTLM_RULE float as_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// NaN stays NaN
FASTLM_RULE double clip(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

FASTLM_RULE float widen(float x) { return x; }

FASTLM_RULE float widen(bf16 x) { return as_float(uint32_t(x.bits) << 16); }

FASTLM_RULE float widen(f16 x) {
    const uint32_t exponent = x.bits & 0x7c00u;
    uint32_t u = (uint32_t(x.bits & 0x7fffu) << 13) + (112u << 23);  // rebias 15 → 127
    u += exponent == 0x7c00u ? 112u << 23 : 0u;                      // inf and NaN keep an exponent of all ones
    // subnormal: put the leading one in, take it out as a float
    u += exponent == 0u ? 1u << 23 : 0u;
    const float magnitude = as_float(u) - (exponent == 0u ? as_float(113u << 23) : 0.0f);
    return as_float(as_bits(magnitude) | (uint32_t(x.bits & 0x8000u) << 16));
}

FASTLM_RULE void narrow(float x, float& out) { out = x; }

// Round to nearest, ties to even, as hardware does; NaN becomes the usual one.
FASTLM_RULE void narrow(float x, bf16& out) {
    const uint32_t u = as_bits(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    out.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

FASTLM_RULE void narrow(float x, f16& out) {
    const uint32_t u = as_bits(x), magnitude = u & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - (126u << 23);  // the addition shifts and rounds
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    out.bits = uint16_t((magnitude >= 0x47800000u ? special : finite) | ((u >> 16) & 0x8000u));
}

}  // namespace fastlm

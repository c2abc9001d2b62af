/* Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 random bits as a
pure function of a 128-bit counter and a 64-bit key; and the rounding that uses them.

Stochastic rounding of fp32 to bf16 adds 16 random bits below the bits that stay, and cuts: x goes up with the
probability that makes the mean x. Element e of a parameter takes half-word e mod 8 of the counter (e / 8 low, e / 8
high, step, 0) under the parameter's key, low half first, so the same step gives the same bits on every processor, in
whatever order elements are visited. fastlm/ops/optim/precision.py defines the same. */
#pragma once

#include "numeric.h"

namespace fastlm {

struct Philox {
    uint32_t x[4];
};

FASTLM_RULE Philox philox(Philox c, uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; round++) {
        const uint64_t a = uint64_t(0xD2511F53u) * c.x[0], b = uint64_t(0xCD9E8D57u) * c.x[2];
        c = {{uint32_t(b >> 32) ^ c.x[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c.x[3] ^ k1, uint32_t(a)}};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

constexpr int DRAWS = 8;  // half-words of one counter

FASTLM_RULE Philox noise(uint64_t eighth, uint32_t step, uint64_t key) {
    return philox({{uint32_t(eighth), uint32_t(eighth >> 32), step, 0u}}, key);
}

// Draw e of a counter is this half of its word e / 2.
FASTLM_RULE uint32_t half_word(uint32_t word, int e) { return e % 2 ? word >> 16 : word & 0xffffu; }

FASTLM_RULE void stochastic_round(float x, uint32_t draw, bf16& out) {
    out.bits = uint16_t(x != x ? 0x7fc0u : (as_bits(x) + draw) >> 16);
}

// The 16-bit remainder: fp32 as a bf16, rounded half away from zero, and the signed rest of its bits. Nothing is lost,
// except that a NaN becomes the usual one: the carry must not turn it into a number.
FASTLM_RULE void split(float x, bf16& high, int16_t& low) {
    const uint32_t u = x != x ? 0x7fc00000u : as_bits(x);
    high.bits = uint16_t((u + 0x8000u) >> 16);
    low = int16_t(uint16_t(u));
}

// What both make. high may have been written by others since: a remainder that would make a NaN of it counts as zero.
FASTLM_RULE float join(bf16 high, int16_t low) {
    const float x = as_float((uint32_t(high.bits) << 16) + uint32_t(int32_t(low)));
    return x != x ? widen(high) : x;
}

}  // namespace fastlm

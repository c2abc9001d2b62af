/* The parameter as every optimizer sees it, VECTOR elements at a time: the CUDA side of csrc/cpu/optim/parameter.h.
Host and device code.

How parameters are kept is known when a kernel is compiled: OWN and NOISE have the parameter as list 0, COMPANION has
its companion, fp32 masters or 16-bit remainders, as list 1 besides. A remainder travels as bits in a float (map.h). */
#pragma once

#include "../rules/philox.h"
#include "map.h"

namespace fastlm {

enum Kept { OWN, NOISE, COMPANION };

template <typename Rule>
struct Now {  // what a step is for one tensor
    Rule rule;
    uint32_t step;
    uint64_t key;  // of the parameter's noise
};

// What comes after the parameter: list 1, or list 2 where list 1 is a companion.
template <Kept KEPT>
constexpr int REST = KEPT == COMPANION ? 2 : 1;

// The lists that are written when the parameter is, and those of OTHERS, a mask that begins after it.
template <Kept KEPT, unsigned OTHERS>
constexpr unsigned WRITTEN = KEPT == COMPANION ? 0b11 | OTHERS << 2 : 0b1 | OTHERS << 1;

// x as a tensor of this dtype will hold it.
FASTLM_RULE float stored(float x, int dtype) {
    if (dtype == F32) return x;
    const uint32_t pair = narrow_pair(x, x, dtype);
    return dtype == BF16 ? as_float(pair << 16) : widen_f16(pair & 0xffffu);
}

// The parameter in fp32; dtype: of the lists. A master counts wherever the model's own bits are it, rounded.
template <Kept KEPT, int LISTS>
FASTLM_RULE float read(const float (&x)[LISTS][VECTOR], int e, const int* dtype) {
    if constexpr (KEPT != COMPANION) return x[0][e];
    else if (dtype[1] == F32) return stored(x[1][e], dtype[0]) == x[0][e] ? x[1][e] : x[0][e];
    else return join(bf16{uint16_t(as_bits(x[0][e]) >> 16)}, int16_t(uint16_t(as_bits(x[1][e]))));
}

// Put theta where `map` stores it from. element: the number of theta[0] in its tensor, a multiple of VECTOR.
template <Kept KEPT, int LISTS>
FASTLM_RULE void write(const float (&theta)[VECTOR], float (&x)[LISTS][VECTOR], int companion_dtype, int64_t element,
    uint32_t step, uint64_t key) {
    if constexpr (KEPT == NOISE) {
        const Philox w = noise(uint64_t(element) / DRAWS, step, key);
        const bool second = element % DRAWS != 0;  // half of the eight draws
        const uint32_t low = second ? w.x[2] : w.x[0], high = second ? w.x[3] : w.x[1];
        const uint32_t draw[VECTOR] = {low & 0xffffu, low >> 16, high & 0xffffu, high >> 16};
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
            bf16 rounded;
            narrow_stochastically(theta[e], draw[e], rounded);
            x[0][e] = widen(rounded);
        }
    } else if constexpr (KEPT == COMPANION) {
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
            bf16 high;
            int16_t low;
            split(theta[e], high, low);
            x[0][e] = companion_dtype == F32 ? theta[e] : widen(high);
            x[1][e] = companion_dtype == F32 ? theta[e] : as_float(uint32_t(uint16_t(low)));
        }
    } else {
#pragma unroll
        for (int e = 0; e < VECTOR; e++) x[0][e] = theta[e];
    }
}

}  // namespace fastlm

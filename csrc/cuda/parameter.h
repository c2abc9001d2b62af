/* The parameter as every optimizer sees it, VECTOR elements at a time: the CUDA side of csrc/cpu/optim/parameter.h.
Host and device code.

How parameters are kept is known when a kernel is compiled: OWN and STOCHASTIC have the parameter as list 0, MASTER has
its master, fp32 or a 16-bit remainder, as list 1 besides. A remainder travels as bits in a float (map.h). */
#pragma once

#include "../rules/philox.h"
#include "map.h"

namespace fastlm {

enum Precision { OWN, STOCHASTIC, MASTER };

template <typename Rule>
struct Now {  // what a step is for one tensor
    Rule rule;
    uint32_t step;
    uint64_t key;  // of the parameter's noise
};

// What comes after the parameter: list 1, or list 2 where list 1 is a master.
template <Precision PRECISION>
constexpr int REST = PRECISION == MASTER ? 2 : 1;

// The lists that are written when the parameter is, and those of OTHERS, a mask that begins after it.
template <Precision PRECISION, unsigned OTHERS>
constexpr unsigned WRITTEN = PRECISION == MASTER ? 0b11 | OTHERS << 2 : 0b1 | OTHERS << 1;

// x as a tensor of this dtype will hold it.
FASTLM_RULE float stored(float x, int dtype) {
    if (dtype == F32) return x;
    const uint32_t pair = narrow_pair(x, x, dtype);
    return dtype == BF16 ? as_float(pair << 16) : widen_f16(pair & 0xffffu);
}

// The parameter in fp32; dtype: of the lists. A master counts wherever the model's own bits are it, rounded.
template <Precision PRECISION, int LISTS>
FASTLM_RULE float read(const float (&x)[LISTS][VECTOR], int e, const int* dtype) {
    if constexpr (PRECISION != MASTER) return x[0][e];
    else if (dtype[1] == F32) return stored(x[1][e], dtype[0]) == x[0][e] ? x[1][e] : x[0][e];
    else return join(bf16{uint16_t(as_bits(x[0][e]) >> 16)}, int16_t(uint16_t(as_bits(x[1][e]))));
}

// Put theta where `map` stores it from. element: the number of theta[0] in its tensor, a multiple of VECTOR.
template <Precision PRECISION, int LISTS>
FASTLM_RULE void write(const float (&theta)[VECTOR], float (&x)[LISTS][VECTOR], int master_dtype, int64_t element,
    uint32_t step, uint64_t key) {
    if constexpr (PRECISION == STOCHASTIC) {
        const Philox w = noise(uint64_t(element) / DRAWS, step, key);
        const bool second = element % DRAWS != 0;  // half of the eight draws
        const uint32_t low = second ? w.x[2] : w.x[0], high = second ? w.x[3] : w.x[1];
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
            bf16 rounded;
            stochastic_round(theta[e], half_word(e < 2 ? low : high, e), rounded);
            x[0][e] = widen(rounded);
        }
    } else if constexpr (PRECISION == MASTER) {
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
            bf16 high;
            int16_t low;
            split(theta[e], high, low);
            x[0][e] = master_dtype == F32 ? theta[e] : widen(high);
            x[1][e] = master_dtype == F32 ? theta[e] : as_float(uint32_t(uint16_t(low)));
        }
    } else {
#pragma unroll
        for (int e = 0; e < VECTOR; e++) x[0][e] = theta[e];
    }
}

}  // namespace fastlm

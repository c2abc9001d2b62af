/* The parameter as every optimizer sees it: load gives fp32, store puts fp32 back, whatever completes the 16 bits that
the model has.

    master fp32     the master copy is the parameter, wherever the model's own bits are it, rounded to nearest
    master int16    the remainder: the model's bf16 and these 16 bits are the parameter, exactly
    stochastic      the model's bf16 is the parameter; what does not fit is rounded stochastically (rules/philox.h)
    otherwise       the model's own bits, rounded to nearest
*/
#pragma once

#include "../../rules/philox.h"
#include "../isa.h"

namespace fastlm {
namespace FASTLM_ISA {

// Put into a master what others have written since into the model's own bits, which then are not it, rounded.
template <typename T>
static inline void refresh(float* master, const T* stored, int n) {
    T rounded[BLOCK];
    narrow_all(master, rounded, n);
    uint16_t differs = 0;
    for (int i = 0; i < n; i++) differs |= rounded[i].bits ^ stored[i].bits;
    if (differs)  // seldom
        for (int i = 0; i < n; i++) master[i] = rounded[i].bits == stored[i].bits ? master[i] : widen(stored[i]);
}

static inline float* refreshed(float* master, Span stored, int64_t o, int n) {
    const void* here = at(stored.data, stored.dtype, o);
    if (stored.dtype == BF16) refresh(master, static_cast<const bf16*>(here), n);
    else refresh(master, static_cast<const f16*>(here), n);
    return master;
}

// n elements of p from o on, in fp32: memory itself where that is fp32, else buffer.
static inline float* load(const Parameter& p, int64_t o, float* buffer, int n) {
    if (p.master.data == nullptr) return load(p.stored, o, buffer, n);
    if (p.master.dtype == F32) return refreshed(static_cast<float*>(p.master.data) + o, p.stored, o, n);
    const bf16* high = static_cast<const bf16*>(p.stored.data) + o;
    const int16_t* low = static_cast<const int16_t*>(p.master.data) + o;
    for (int i = 0; i < n; i++) buffer[i] = join(high[i], low[i]);
    return buffer;
}

static inline void store_stochastically(
    const float* x, bf16* out, int n, int64_t element, uint32_t step, uint64_t key) {
    constexpr int MOST = BLOCK / DRAWS + 2;
    uint32_t words[4][MOST];
    const uint64_t begin = uint64_t(element) / DRAWS;
    const int counters = int((uint64_t(element) + n - 1) / DRAWS - begin) + 1;
    // Philox for several counters side by side, which compilers vectorise
    for (int i = 0; i < counters; i++) {
        const Philox w = noise(begin + i, step, key);
        words[0][i] = w.x[0];
        words[1][i] = w.x[1];
        words[2][i] = w.x[2];
        words[3][i] = w.x[3];
    }
    // their draws in the order of elements, of which the first need not begin a counter
    uint16_t draws[MOST * DRAWS];
    for (int i = 0; i < counters; i++)
        for (int e = 0; e < DRAWS; e++) draws[DRAWS * i + e] = uint16_t(half_word(words[e / 2][i], e));
    const uint16_t* draw = draws + uint64_t(element) % DRAWS;
    for (int i = 0; i < n; i++) stochastic_round(x[i], draw[i], out[i]);
}

// The way back, from what load returned.
static inline void store(const float* x, const Parameter& p, int64_t o, int n) {
    if (p.master.data != nullptr && p.master.dtype == I16) {
        bf16* high = static_cast<bf16*>(p.stored.data) + o;
        int16_t* low = static_cast<int16_t*>(p.master.data) + o;
        for (int i = 0; i < n; i++) split(x[i], high[i], low[i]);
    } else if (p.stochastic) {
        store_stochastically(x, static_cast<bf16*>(p.stored.data) + o, n, p.first + o, p.step, p.key);
    } else {
        store(x, p.stored, o, n);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm

/* The parameter as every optimizer sees it: load gives fp32, store puts fp32 back, whatever completes the 16 bits that
the model has.

    companion fp32     the master copy is the parameter, wherever the model's own bits are it, rounded to nearest
    companion int16    the model's bf16 and 16 more bits are the parameter, exactly
    stochastic         the model's bf16 is the parameter; what does not fit is rounded by noise (rules/philox.h)
    otherwise          the model's own bits, rounded to nearest
*/
#pragma once

#include "../../rules/philox.h"
#include "../isa.h"

namespace fastlm {
namespace FASTLM_ISA {

// A master, with what others have written since into the model's own bits, which then are not it, rounded.
template <typename T>
static inline void refresh(float* master, const T* stored, T* rounded, int n) {
    narrow_all(master, rounded, n);
    for (int i = 0; i < n; i++) master[i] = rounded[i].bits == stored[i].bits ? master[i] : widen(stored[i]);
}

static inline float* refreshed(float* master, Span stored, int64_t o, float* buffer, int n) {
    const void* here = at(stored.data, stored.dtype, o);
    if (stored.dtype == BF16) refresh(master, static_cast<const bf16*>(here), reinterpret_cast<bf16*>(buffer), n);
    else refresh(master, static_cast<const f16*>(here), reinterpret_cast<f16*>(buffer), n);
    return master;
}

// n elements of p from o on, in fp32: memory itself where that is fp32, else buffer.
static inline float* load(const Parameter& p, int64_t o, float* buffer, int n) {
    if (p.companion.data == nullptr) return load(p.stored, o, buffer, n);
    if (p.companion.dtype == F32) return refreshed(static_cast<float*>(p.companion.data) + o, p.stored, o, buffer, n);
    const bf16* high = static_cast<const bf16*>(p.stored.data) + o;
    const int16_t* low = static_cast<const int16_t*>(p.companion.data) + o;
    for (int i = 0; i < n; i++) buffer[i] = join(high[i], low[i]);
    return buffer;
}

static inline void store_by_noise(const float* x, bf16* out, int n, int64_t element, uint32_t step, uint64_t key) {
    constexpr int MOST = BLOCK / DRAWS + 2;
    uint32_t words[4][MOST];
    const uint64_t begin = uint64_t(element) / DRAWS;
    const int counters = int((uint64_t(element) + n - 1) / DRAWS - begin) + 1;
    for (int i = 0; i < counters; i++) {
        const Philox w = noise(begin + i, step, key);
        words[0][i] = w.x[0], words[1][i] = w.x[1], words[2][i] = w.x[2], words[3][i] = w.x[3];
    }
    uint16_t halves[MOST * DRAWS];
    for (int i = 0; i < counters; i++)
        for (int w = 0; w < 4; w++)
            halves[DRAWS * i + 2 * w] = uint16_t(words[w][i]),
                                   halves[DRAWS * i + 2 * w + 1] = uint16_t(words[w][i] >> 16);
    const uint16_t* draw = halves + uint64_t(element) % DRAWS;
    for (int i = 0; i < n; i++) narrow_stochastically(x[i], draw[i], out[i]);
}

// The way back, from what load returned.
static inline void store(const float* x, const Parameter& p, int64_t o, int n) {
    if (p.companion.data != nullptr && p.companion.dtype == I16) {
        bf16* high = static_cast<bf16*>(p.stored.data) + o;
        int16_t* low = static_cast<int16_t*>(p.companion.data) + o;
        for (int i = 0; i < n; i++) split(x[i], high[i], low[i]);
    } else if (p.stochastic) {
        store_by_noise(x, static_cast<bf16*>(p.stored.data) + o, n, p.first + o, p.step, p.key);
    } else {
        store(x, p.stored, o, n);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm

// Loops over a row of fp32: W elements at a time, and what is left one by one. A body is given a zero, V or float,
// whose type says which it is, and the number of its first element.
#pragma once

#include "../vector.h"

namespace fastlm {
namespace FASTLM_ISA {

static FASTLM_INLINE V take(V, const float* p) { return load(p); }
static FASTLM_INLINE float take(float, const float* p) { return *p; }
static FASTLM_INLINE void put(float* p, V x) { store(p, x); }
static FASTLM_INLINE void put(float* p, float x) { *p = x; }

// The first n < W lanes, the others as `otherwise` says.
static FASTLM_INLINE V load(const float* p, int n, float otherwise) {
    V x = V{} + otherwise;
    for (int l = 0; l < n; l++) x[l] = p[l];
    return x;
}

static FASTLM_INLINE void store(float* p, V x, int n) {
    for (int l = 0; l < n; l++) p[l] = x[l];
}

template <class Body>
static FASTLM_INLINE void each(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(V{}, i);
    for (; i < n; i++) body(0.0f, i);
}

// Σ term, as 32 sums side by side whatever W is, so that all instruction sets give the same bits.
template <class Term>
static FASTLM_INLINE float sum(int64_t n, const Term& term) {
    constexpr int ACROSS = 32;
    V s[ACROSS / W] = {};
    int64_t i = 0;
    for (; i + ACROSS <= n; i += ACROSS)
        for (int l = 0; l < ACROSS / W; l++) s[l] += term(V{}, i + l * W);
    float sums[ACROSS];
    for (int l = 0; l < ACROSS / W; l++) store(sums + l * W, s[l]);
    for (; i < n; i++) sums[i % ACROSS] += term(0.0f, i);
    for (int half = ACROSS / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) sums[l] += sums[l + half];
    return sums[0];
}

}  // namespace FASTLM_ISA
}  // namespace fastlm

/*
Vectors of fp32 as wide as the instruction set's registers, in the compiler's own vector types, which take + - * < ?: as
scalars do; intrinsics only for what those have no word for: fused multiply-add, products of bf16 pairs, 2ˣ.
*/
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "isa.h"

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // the second is Clang's, before 15
#define FASTLM_AMX
#endif

#define FASTLM_INLINE inline __attribute__((always_inline))
#define FASTLM_LAMBDA __attribute__((always_inline))

namespace fastlm {
namespace FASTLM_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W), may_alias));
typedef float Unaligned __attribute__((vector_size(4 * W), may_alias, aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * W), may_alias));

typedef uint32_t Words __attribute__((vector_size(4 * W), may_alias));
typedef uint64_t Longs __attribute__((vector_size(4 * W), may_alias));

static FASTLM_INLINE V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
static FASTLM_INLINE void store(float* p, V x) { *reinterpret_cast<Unaligned*>(p) = x; }
static FASTLM_INLINE void add_to(float* p, V x) { store(p, load(p) + x); }
static FASTLM_INLINE V max(V a, V b) { return a > b ? a : b; }

#if defined(__AVX512F__)
static FASTLM_INLINE V broadcast(float x) { return _mm512_set1_ps(x); }
static FASTLM_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
static FASTLM_INLINE V broadcast(float x) { return _mm256_set1_ps(x); }
static FASTLM_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
#else
static FASTLM_INLINE V broadcast(float x) { return x - V{}; }
static FASTLM_INLINE V fma(V a, V b, V c) { return a * b + c; }
#endif

static FASTLM_INLINE V root(V x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
    return _mm_sqrt_ps(x);
#else
    for (int l = 0; l < W; l++) x[l] = __builtin_sqrtf(x[l]);
    return x;
#endif
}

// The 64-bit products of the low halves of 64-bit lanes.
static FASTLM_INLINE Longs multiply_low_halves(Longs a, Longs b) {
#if defined(__AVX512F__)
    return (Longs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// 2ˣ with a relative error below 2⁻²³ for -126 ≤ x ≤ 127; towards 0 below, 0 for -∞, NaN for NaN. The polynomial
// is the best of degree 6 for 2ᶠ on [0, 1), 1.9e-9 from it.
static FASTLM_INLINE V exp2(V x) {
#if defined(__AVX512F__)
    const V f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    const V floor_at = broadcast(-127.0f);
    const V y = x < floor_at ? floor_at : x;
    Ints n = __builtin_convertvector(y, Ints);
    V f = y - __builtin_convertvector(n, V);
    const Ints below = f < V{};  // -1 where truncation went up
    n += below;
    f -= __builtin_convertvector(below, V);
#endif
    V p = broadcast(2.170225545e-04f);
    p = fma(p, f, broadcast(1.243968783e-03f));
    p = fma(p, f, broadcast(9.678840996e-03f));
    p = fma(p, f, broadcast(5.548334198e-02f));
    p = fma(p, f, broadcast(2.402298363e-01f));
    p = fma(p, f, broadcast(6.931469838e-01f));
    p = fma(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
    return _mm512_maskz_scalef_ps(0xffff, p, x);  // 12.2 of GCC warns about the form without a mask
#else
    const V scaled = (V)((Ints)p + (n * (1 << 23)));
    return x < broadcast(-126.0f) ? V{} : scaled;
#endif
}

// eˣ for x ≤ 0: exact at 0; relative error below 2⁻²³ + 1.25 |x| · 2⁻²⁴, the second part from rounding x · log₂e; below
// 2⁻¹²⁶ it may give 0. The tests ask for it; benchmarks/FACTS.md has the largest errors over every float.
static FASTLM_INLINE V exp(V x) { return exp2(x * 1.4426950408889634f); }

// Below 0.625 x + x³ p(x²), where p is the best of its degree, 4.4e-9 of tanh from it; above by e^(-2|x|).
static FASTLM_INLINE V tanh(V x) {
    const V a = x < 0.0f ? -x : x, square = x * x;
    V p = broadcast(-5.704978373e-03f);
    p = fma(p, square, broadcast(2.063907874e-02f));
    p = fma(p, square, broadcast(-5.373971216e-02f));
    p = fma(p, square, broadcast(1.333144216e-01f));
    p = fma(p, square, broadcast(-3.333328194e-01f));
    const V power = exp(-2.0f * a), far = 1.0f - 2.0f * power / (1.0f + power);
    return a < 0.625f ? fma(p * square, x, x) : x < 0.0f ? -far : far;
}

/* How a product is taken. Operands are 32-bit words, kept as fp32 whatever they hold; a word is one fp32, or two bf16
that are multiplied with two others and added. PAIR is the number of terms in a word; TILES, whether whole tiles are
multiplied where both operands allow it (amx.h).
*/
struct Fma {
    static constexpr int PAIR = 1;
    static constexpr bool TILES = false;
    static FASTLM_INLINE V multiply_add(V a, V b, V c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Bf16Dot {
    static constexpr int PAIR = 2;
#if defined(FASTLM_AMX)
    static constexpr bool TILES = true;
#else
    static constexpr bool TILES = false;
#endif
    static FASTLM_INLINE V multiply_add(V a, V b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

// Two vectors rounded to bf16, one after the other: lane l of the result holds elements 2l and 2l + 1 of [a, b].
static FASTLM_INLINE V narrow_pair(V a, V b) { return (V)_mm512_cvtne2ps_pbh(b, a); }

// Lane l of the result holds a[l] and b[l], rounded to bf16.
static FASTLM_INLINE V interleave(V a, V b) {
    typedef int16_t Shorts __attribute__((vector_size(64)));
    const Shorts order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
        13, 29, 14, 30, 15, 31};
    return (V)_mm512_permutexvar_epi16((__m512i)order, (__m512i)narrow_pair(a, b));
}
#endif

}  // namespace FASTLM_ISA
}  // namespace fastlm

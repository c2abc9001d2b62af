/* One source, several instruction sets. Files that include this are compiled once for each set, with FASTLM_ISA defined
as portable, avx2, avx512, avx512_bf16 or amx and the compiler's matching flags; the best set the processor has is
chosen at run time (isa.cpp).

Such a file uses no inline function of the C++ library and defines nothing outside its own namespace: a function that
the linker shares between sets would run AVX-512 code on a processor without it (tests/test_native.py looks). Loops are
plain C++ that compilers vectorise, with the order of every sum written out, so that all sets give the same bits
(-ffp-contract=off). */
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "kernels.h"

#ifndef FASTLM_ISA
#error "compile with -DFASTLM_ISA=portable, avx2, avx512, avx512_bf16 or amx"
#endif

namespace fastlm {
namespace FASTLM_ISA {

constexpr int BLOCK = 1024;  // elements worked on at a time: a few blocks of fp32 stay in the first-level cache
constexpr int SHORT = 256;  // the same without sums over them: memory that is converted first, and the rest, overlap

// fp32 view of n elements at data: the data itself where it is fp32, else a widened copy in buffer.
template <typename T>
static inline float* load_as(T* data, float* buffer, int n) {
    for (int i = 0; i < n; i++) buffer[i] = widen(data[i]);
    return buffer;
}

static inline float* load(void* data, int dtype, float* buffer, int n) {
    switch (dtype) {
        case BF16: return load_as(static_cast<bf16*>(data), buffer, n);
        case F16: return load_as(static_cast<f16*>(data), buffer, n);
        default: return static_cast<float*>(data);
    }
}

// Round n elements. The processor's own instruction does 32 at once, unless one is subnormal, which it takes for zero,
// or NaN.
static inline void narrow_all(const float* __restrict x, bf16* __restrict out, int n) {
    int i = 0;
#if defined(__AVX512BF16__)
    constexpr int QUIET = 0x01, SUBNORMAL = 0x20, SIGNALING = 0x80, UNUSUAL = QUIET | SUBNORMAL | SIGNALING;
    for (; i + 32 <= n; i += 32) {
        const __m512 low = _mm512_loadu_ps(x + i), high = _mm512_loadu_ps(x + i + 16);
        if (__builtin_expect(_mm512_fpclass_ps_mask(low, UNUSUAL) | _mm512_fpclass_ps_mask(high, UNUSUAL), 0))
            for (int e = i; e < i + 32; e++) narrow(x[e], out[e]);
        else _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
#endif
    for (; i < n; i++) narrow(x[i], out[i]);
}

static inline void narrow_all(const float* __restrict x, f16* __restrict out, int n) {
    for (int i = 0; i < n; i++) narrow(x[i], out[i]);
}

// The way back: round n elements of buffer into data; nothing to do where load gave the data itself.
static inline void store(const float* buffer, void* data, int dtype, int n) {
    if (dtype == BF16) narrow_all(buffer, static_cast<bf16*>(data), n);
    else if (dtype == F16) narrow_all(buffer, static_cast<f16*>(data), n);
}

// element_size as a factor of strides and offsets, which are of 64 bits
static inline int64_t size_of(int dtype) { return element_size(dtype); }

static inline void* at(void* data, int dtype, int64_t i) { return static_cast<char*>(data) + i * size_of(dtype); }

static inline Span at(Span x, int64_t i) { return {at(x.data, x.dtype, i), x.dtype}; }

static inline float* load(Span x, int64_t o, float* buffer, int n) {
    return load(at(x.data, x.dtype, o), x.dtype, buffer, n);
}

static inline void store(const float* buffer, Span x, int64_t o, int n) {
    store(buffer, at(x.data, x.dtype, o), x.dtype, n);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm

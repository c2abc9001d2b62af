/*
One source, several instruction sets. Files that include this are compiled once for each set, with FASTLM_ISA defined as
portable, avx2, avx512 or avx512_bf16 and the compiler's matching flags; the best set the processor has is chosen at run time (isa.cpp).

Such a file uses no inline function of the C++ library and defines nothing outside its own namespace: a function that the
linker shares between sets would run AVX-512 code on a processor without it (tests/test_native.py looks). Loops are plain C++
that compilers vectorise, with the order of every sum written out, so that all sets give the same bits (-ffp-contract=off).
*/
#pragma once

#include "kernels.h"

#ifndef FASTLM_ISA
#error "compile with -DFASTLM_ISA=portable, avx2, avx512 or avx512_bf16"
#endif

namespace fastlm {
namespace FASTLM_ISA {

constexpr int BLOCK = 1024;  // elements worked on at a time: a few blocks of fp32 stay in the first-level cache

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

// The way back: round n elements of buffer into data; nothing to do where load gave the data itself.
static inline void store(const float* buffer, void* data, int dtype, int n) {
    if (dtype == BF16)
        for (int i = 0; i < n; i++) narrow(buffer[i], static_cast<bf16*>(data)[i]);
    else if (dtype == F16)
        for (int i = 0; i < n; i++) narrow(buffer[i], static_cast<f16*>(data)[i]);
}

static inline int64_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }

static inline void* at(void* data, int dtype, int64_t i) { return static_cast<char*>(data) + i * size_of(dtype); }

}  // namespace FASTLM_ISA
}  // namespace fastlm

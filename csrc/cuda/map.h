/* Loads, stores and the loop over a chunk. Host and device code: on the device a block of THREADS threads runs it
together; tests run it on the host, one thread after another, on real memory under sanitizers.

VECTOR elements move as one. The dtype is a number that travels with the address: picking a load by it costs a predicate
in code that waits for memory, and saves a kernel for each of 3 × 3 × 3 × 3 mixes. All threads of a block agree on it.
*/
#pragma once

#include "batch.h"

namespace fastlm {

constexpr int THREADS = 256, WARP = 32;

// ---------------------------------------------------------------------------------------------------------------------
// Loads and stores

struct alignas(8) Half {
    uint32_t x, y;
};

// VECTOR elements as they lie in memory: four words of fp32, or two words of a 16-bit type and two unused.
struct alignas(16) Raw {
    uint32_t x, y, z, w;
};

FASTLM_RULE Raw load_vector(const void* data, int dtype, int i) {
    const char* at = static_cast<const char*>(data) + i * (VECTOR * element_size(dtype));
    if (dtype == F32) return *reinterpret_cast<const Raw*>(at);
    const Half half = *reinterpret_cast<const Half*>(at);
    return {half.x, half.y, 0, 0};
}

FASTLM_RULE void store_vector(void* data, int dtype, int i, Raw raw) {
    char* at = static_cast<char*>(data) + i * (VECTOR * element_size(dtype));
    if (dtype == F32) *reinterpret_cast<Raw*>(at) = raw;
    else *reinterpret_cast<Half*>(at) = {raw.x, raw.y};
}

// The same for addresses that are not aligned, and for the end of a tensor: one element at a time, zero from n on.
FASTLM_RULE Raw load_elements(const void* data, int dtype, int i, int n) {
    uint32_t x[VECTOR] = {};
#pragma unroll
    for (int e = 0; e < VECTOR; e++) {
        const int o = VECTOR * i + e;
        if (o < n) x[e] = dtype == F32 ? static_cast<const uint32_t*>(data)[o] : static_cast<const uint16_t*>(data)[o];
    }
    return dtype == F32 ? Raw{x[0], x[1], x[2], x[3]} : Raw{x[0] | x[1] << 16, x[2] | x[3] << 16, 0, 0};
}

FASTLM_RULE void store_elements(void* data, int dtype, int i, int n, Raw raw) {
    const uint32_t fp32[VECTOR] = {raw.x, raw.y, raw.z, raw.w}, half[VECTOR] = {raw.x, raw.x >> 16, raw.y, raw.y >> 16};
#pragma unroll
    for (int e = 0; e < VECTOR; e++) {
        const int o = VECTOR * i + e;
        if (o >= n) continue;
        if (dtype == F32) static_cast<uint32_t*>(data)[o] = fp32[e];
        else static_cast<uint16_t*>(data)[o] = uint16_t(half[e]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversions: numeric.h's, which the device has in hardware

FASTLM_RULE float widen_f16(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(bits)));
    return x;
#else
    return widen(f16{uint16_t(bits)});
#endif
}

FASTLM_RULE uint32_t narrow_pair(float low, float high, int dtype) {
#if defined(__CUDA_ARCH__)
    uint32_t both;
    if (dtype == BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    bf16 b[2];
    f16 h[2];
    narrow(low, b[0]);
    narrow(high, b[1]);
    narrow(low, h[0]);
    narrow(high, h[1]);
    return dtype == BF16 ? b[0].bits | uint32_t(b[1].bits) << 16 : h[0].bits | uint32_t(h[1].bits) << 16;
#endif
}

FASTLM_RULE void widen_vector(Raw raw, int dtype, float (&x)[VECTOR]) {
    if (dtype == F32) x[0] = as_float(raw.x), x[1] = as_float(raw.y), x[2] = as_float(raw.z), x[3] = as_float(raw.w);
    else if (dtype == I16)  // bits, not a number: the low half of each word
        x[0] = as_float(raw.x & 0xffffu), x[1] = as_float(raw.x >> 16), x[2] = as_float(raw.y & 0xffffu),
        x[3] = as_float(raw.y >> 16);
    else if (dtype == BF16)
        x[0] = as_float(raw.x << 16), x[1] = as_float(raw.x & 0xffff0000u), x[2] = as_float(raw.y << 16),
        x[3] = as_float(raw.y & 0xffff0000u);
    else x[0] = widen_f16(raw.x), x[1] = widen_f16(raw.x >> 16), x[2] = widen_f16(raw.y), x[3] = widen_f16(raw.y >> 16);
}

FASTLM_RULE Raw narrow_vector(const float (&x)[VECTOR], int dtype) {
    if (dtype == F32) return {as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])};
    if (dtype == I16)
        return {(as_bits(x[0]) & 0xffffu) | as_bits(x[1]) << 16, (as_bits(x[2]) & 0xffffu) | as_bits(x[3]) << 16, 0, 0};
    return {narrow_pair(x[0], x[1], dtype), narrow_pair(x[2], x[3], dtype), 0, 0};
}

// ---------------------------------------------------------------------------------------------------------------------
// The loop

// One thread's part of a chunk that N threads share: call f(x, i), where x[l][e] are the elements of each list in fp32
// and i is the vector's number in the chunk, on VECTOR elements at a time, and store the lists whose bit is set in
// WRITTEN. FLIGHT vectors of each list are loaded before the first is used. Past the end x is zero and nothing is
// stored. Vector i always goes to thread i % N, in order: a sum has the same bits whether or not addresses are aligned.
template <unsigned WRITTEN, int FLIGHT, int N = THREADS, int LISTS, typename F>
FASTLM_RULE void map(const Chunk<LISTS>& c, int thread, const F& f) {
    const int whole = aligned(c) ? c.n / VECTOR : 0;
    for (int i = thread; i < whole; i += FLIGHT * N) {
        Raw raw[FLIGHT][LISTS];
#pragma unroll
        for (int k = 0; k < FLIGHT; k++)
#pragma unroll
            for (int l = 0; l < LISTS; l++)
                raw[k][l] = i + k * N < whole ? load_vector(c.data[l], c.dtype[l], i + k * N) : Raw{0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < FLIGHT; k++) {
            float x[LISTS][VECTOR];
#pragma unroll
            for (int l = 0; l < LISTS; l++) widen_vector(raw[k][l], c.dtype[l], x[l]);
            f(x, i + k * N);
#pragma unroll
            for (int l = 0; l < LISTS; l++)
                if ((WRITTEN >> l & 1) && i + k * N < whole)
                    store_vector(c.data[l], c.dtype[l], i + k * N, narrow_vector(x[l], c.dtype[l]));
        }
    }
    for (int i = whole + (thread + N - whole % N) % N; i * VECTOR < c.n; i += N) {
        float x[LISTS][VECTOR];
#pragma unroll
        for (int l = 0; l < LISTS; l++) widen_vector(load_elements(c.data[l], c.dtype[l], i, c.n), c.dtype[l], x[l]);
        f(x, i);
#pragma unroll
        for (int l = 0; l < LISTS; l++)
            if (WRITTEN >> l & 1) store_elements(c.data[l], c.dtype[l], i, c.n, narrow_vector(x[l], c.dtype[l]));
    }
}

}  // namespace fastlm

/* The tensor cores of sm_80 and later: c [16, 8] += a [16, 16] b [16, 8], of 16-bit numbers with fp32 sums, by the 32
lanes of a warp together, and the loads that bring a and b from shared memory.

Each lane holds a part of each matrix. With g = lane / 4 and t = lane % 4:

    a    rows g, g + 8 of columns 2t, 2t + 1; then the same rows of columns 2t + 8, 2t + 9: a register each
    b    rows 2t, 2t + 1 of column g; then rows 2t + 8, 2t + 9: a register each
    c    columns 2t, 2t + 1 of row g; then of row g + 8: four registers

PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions": mma.sync, with "Matrix Fragments for mma.m16n8k16 with
floating point type", and ldmatrix. */
#pragma once

#include "../../rules/numeric.h"
#include "shared.cuh"

namespace fastlm {

struct FragmentA {
    uint32_t x[4];
};
struct FragmentB {
    uint32_t x[2];
};
struct FragmentC {
    float x[4];
};

#define FASTLM_MMA(type)                                                       \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])               \
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]))

// c += a b, of numbers T
template <typename T>
static __device__ __forceinline__ void mma(FragmentC& c, const FragmentA& a, const FragmentB& b);
template <>
__device__ __forceinline__ void mma<f16>(FragmentC& c, const FragmentA& a, const FragmentB& b) {
    FASTLM_MMA("f16");
}
template <>
__device__ __forceinline__ void mma<bf16>(FragmentC& c, const FragmentA& a, const FragmentB& b) {
    FASTLM_MMA("bf16");
}
#undef FASTLM_MMA

// Four matrices [8, 8] of 16-bit numbers. Lanes 8m … 8m + 7 give the addresses of matrix m's rows of 16 bytes; of it a
// lane gets columns 2t, 2t + 1 of row g, or with `transposed` rows 2t, 2t + 1 of column g.
static __device__ __forceinline__ FragmentA load_matrices(Shared row) {
    FragmentA a;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3])
        : "r"(row));
    return a;
}
static __device__ __forceinline__ FragmentA load_matrices_transposed(Shared row) {
    FragmentA a;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3])
        : "r"(row));
    return a;
}

}  // namespace fastlm

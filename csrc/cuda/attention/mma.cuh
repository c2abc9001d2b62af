/* The tensor cores of sm_80 and later: c [16, 8] += a [16, 16] b [16, 8], of 16-bit numbers with fp32 sums, by the 32
lanes of a warp together, and the loads that bring a and b from shared memory. What a lane holds, and its g and t:
fragments.cuh.

PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions": mma.sync and ldmatrix. */
#pragma once

#include "../../rules/numeric.h"
#include "fragments.cuh"
#include "shared.cuh"

namespace fastlm {

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

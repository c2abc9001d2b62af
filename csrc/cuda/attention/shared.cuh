/* Shared memory by its own 32-bit addresses, as every instruction here takes it.

PTX ISA, "Data Movement and Conversion Instructions": cvta, ld, st. */
#pragma once

#include <cstdint>

namespace fastlm {

using Shared = uint32_t;  // bytes from the start of the block's shared memory

// Where the memory begins that the launch asked for.
static __device__ __forceinline__ Shared shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return Shared(__cvta_generic_to_shared(memory));
}

struct Two {
    float x[2];
};

static __device__ __forceinline__ Two load_two(Shared at) {
    Two two;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(two.x[0]), "=f"(two.x[1]) : "r"(at));
    return two;
}

static __device__ __forceinline__ float load_shared(Shared at) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at));
    return x;
}

static __device__ __forceinline__ void store_two(Shared at, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x), "f"(y));
}

}  // namespace fastlm

/* Copies from global to shared memory that go on while the thread computes, past its registers. A thread commits the
copies it has begun as a group and later waits until no more than PENDING of its groups are on their way; then a barrier
shows everyone what each has copied.

PTX ISA, "Data Movement and Conversion Instructions: Non-bulk copy": cp.async, cp.async.commit_group,
cp.async.wait_group. */
#pragma once

#include "shared.cuh"

namespace fastlm {

// 16 bytes, or zeros unless they are `there`: then nothing is read.
static __device__ __forceinline__ void copy_async(Shared to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
        "r"(there ? 16 : 0));
}

// One fp32 number.
static __device__ __forceinline__ void copy_async(Shared to, const float* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(__cvta_generic_to_global(from)));
}

static __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
static __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace fastlm

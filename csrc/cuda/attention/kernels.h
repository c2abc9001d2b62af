// The kernels of attention as launch.cpp calls them, which has checked everything, and what their launchers share.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../../rules/lists.h"
#include "../device.h"
#include "attention.h"

namespace fastlm {

void segment_bounds(const Attention& a, cudaStream_t stream);
void forward(const Attention& a, int dtype, cudaStream_t stream);
// The gradient, in this order.
void delta(const AttentionBackward& x, int dtype, cudaStream_t stream);
void dq(const AttentionBackward& x, int dtype, cudaStream_t stream);
void dkdv(const AttentionBackward& x, int dtype, cudaStream_t stream);
void table(const AttentionBackward& x, int dtype, cudaStream_t stream);

static inline unsigned grid(int64_t blocks) {
    check(
        blocks < int64_t(1) << 31, "attention over " + std::to_string(blocks) + " tiles of heads; a grid has 2³¹ - 1");
    return unsigned(blocks);
}

// Let the kernel have so many bytes of shared memory, which beyond 48 KB must be asked for.
template <typename Kernel>
static void allow_shared(Kernel kernel, int bytes) {
    if (bytes > 48 << 10)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
            "give a block " + std::to_string(bytes) + " bytes of shared memory");
}

// run(a number of the dtype, the head size that holds D as a constant)
template <typename Run>
static void for_numbers_and_channels(int dtype, int D, const Run& run) {
    using Small = std::integral_constant<int, 64>;
    using Large = std::integral_constant<int, 128>;
    if (dtype == F16) D <= 64 ? run(f16(), Small()) : run(f16(), Large());
    else D <= 64 ? run(bf16(), Small()) : run(bf16(), Large());
}

}  // namespace fastlm

/*
One launcher for "apply this rule to lists of tensors", after apex's multi_tensor_apply.

A rule is a small struct whose call operator does one chunk (batch.h) on one block of threads, mostly through `map`
(map.h). To add an op: a rule, and a launcher that checks what came from Python and calls `launch`.

The dtypes of a list travel with each chunk, and a kernel serves every mix of them. For mixes that training meets most,
`Known` ones, there are kernels of their own, in which dtypes are constants: loads, conversions and branches of the
others are then not there.
*/
#pragma once

#include <cuda_runtime.h>

#include "device.h"
#include "map.h"

namespace fastlm {

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

// DTYPES: as in a batch, of all its tensors, or ANY.
template <unsigned DTYPES, int LISTS, typename Rule>
__global__ void __launch_bounds__(THREADS)
    each_chunk(const __grid_constant__ Batch<LISTS> batch, const __grid_constant__ Rule rule) {
    rule(with_dtypes<DTYPES>(chunk_at(batch, blockIdx.x)));
}

struct Plus {
    __device__ double operator()(double x, double y) const { return x + y; }
};
struct Least {
    __device__ double operator()(double x, double y) const { return y < x ? y : x; }
};

// x of all threads of a warp put together, the same bits whenever the x are; valid in its first thread.
template <typename Fold>
static __device__ double warp_fold(double x, const Fold& fold) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = fold(x, __shfl_down_sync(0xffffffffu, x, distance));
    return x;
}

// The same for a block of N threads; valid in thread 0. Two in a row need a barrier between them: they use the same
// memory.
template <int N, typename Fold>
static __device__ double block_fold(double x, const Fold& fold) {
    __shared__ double warps[N / WARP];
    x = warp_fold(x, fold);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = x;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < N / WARP; w++) x = fold(x, warps[w]);
    return x;
}

template <int N>
static __device__ double block_sum(double x) {
    return block_fold<N>(x, Plus());
}

// ---------------------------------------------------------------------------------------------------------------------
// Launcher

// Dtypes of all tensors of a batch that have kernels of their own.
template <unsigned... DTYPES>
struct Known {};

template <unsigned DTYPES, int LISTS, typename Rule>
bool launch_chunks(const Batch<LISTS>& batch, uint32_t chunks, const Rule& rule, cudaStream_t stream) {
    each_chunk<DTYPES><<<chunks, THREADS, 0, stream>>>(batch, rule);
    return true;
}

template <int LISTS, typename Rule, unsigned... DTYPES>
void launch(const char* name, const Tensors* const (&lists)[LISTS], const Sizes& sizes, const Rule& rule,
    cudaStream_t stream, Known<DTYPES...> = {}) {
    static_assert(sizeof(Batch<LISTS>) + sizeof(Rule) + alignof(Rule) <= ARGUMENT_BYTES,
        "the rule does not fit beside the lists");
    for_each_batch(lists, sizes, [&](const Batch<LISTS>& batch, uint32_t chunks) {
        const unsigned all = dtypes_of(batch);
        ((all == DTYPES && launch_chunks<DTYPES>(batch, chunks, rule, stream)) || ... ||
            launch_chunks<ANY>(batch, chunks, rule, stream));
        check(cudaGetLastError(), std::string("launch ") + name);
    });
}

}  // namespace fastlm

/*
One launcher for "apply this rule to lists of tensors", after apex's multi_tensor_apply.

A rule is a small struct whose call operator does one chunk (batch.h) on one block of threads, mostly through `map` (map.h). To add an op:
a rule, and a launcher that checks what came from Python and calls `launch`.
*/
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "map.h"

namespace fastlm {

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

template <int LISTS, typename Rule>
__global__ void __launch_bounds__(THREADS) each_chunk(const __grid_constant__ Batch<LISTS> batch, const __grid_constant__ Rule rule) {
    rule(chunk_at(batch, blockIdx.x));
}

// The sum of x over all threads of a block of N, the same bits whenever the x are; valid in thread 0.
template <int N>
static __device__ double block_sum(double x) {
    __shared__ double warps[N / 32];
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < N / 32; w++) x += warps[w];
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launcher

static inline void check(bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument(what);
}

// Every CUDA call goes through here, kernel launches with cudaGetLastError() as the code.
static inline void check(cudaError_t code, const std::string& doing) {
    if (code == cudaSuccess) return;
    throw std::runtime_error("CUDA could not " + doing + ": " + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) + ")");
}

static inline void check_list(const char* name, const Tensors& list, const Sizes& sizes, int last_dtype = F16) {
    const std::string who = name;
    check(list.size() == sizes.size(), who + " has " + std::to_string(list.size()) + " tensors for " + std::to_string(sizes.size()) + " sizes");
    for (size_t t = 0; t < list.size(); t++) {
        const auto [address, dtype] = list[t];
        check(sizes[t] >= 0, "a size is negative");
        check(address != 0 || sizes[t] == 0, who + " holds a null address");
        check(dtype >= F32 && dtype <= F16, who + " holds a dtype that is not fp32, bf16 or fp16");
        check(address % element_size(dtype) == 0, who + " holds an address that is not a multiple of its element's size");
    }
}

// Make `device` the current one while this lives.
class OnDevice {
public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "find the current device");
        check(cudaSetDevice(device), "use device " + std::to_string(device));
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
};

template <int LISTS, typename Rule>
void launch(const char* name, const Tensors* const (&lists)[LISTS], const Sizes& sizes, const Rule& rule, cudaStream_t stream) {
    static_assert(sizeof(Batch<LISTS>) + sizeof(Rule) + alignof(Rule) <= ARGUMENT_BYTES, "the rule does not fit beside the lists");
    for_each_batch(lists, sizes, [&](const Batch<LISTS>& batch, uint32_t chunks) {
        each_chunk<<<chunks, THREADS, 0, stream>>>(batch, rule);
        check(cudaGetLastError(), std::string("launch ") + name);
    });
}

}  // namespace fastlm

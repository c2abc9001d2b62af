/* In place of CUDA's header: the files of csrc/cuda compile as C++20 and their kernels run on the host, one block after
another, every thread of a block a thread of this process, with real barriers between them. Only `kernel<<<grid,
threads, …>>>(…)` is rewritten before, by test_cuda_on_host.py, to run(grid, threads, [&] { kernel(…); }). What is not
here the kernels do not use. */
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct Index {
    unsigned x;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim;

enum cudaError_t { cudaSuccess };
using cudaStream_t = struct Stream*;
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct Block {  // what its threads share
    explicit Block(int threads) : everyone(threads) {
        for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<std::barrier<>>(32));
    }
    std::barrier<> everyone;
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    double lanes[1024];
    std::atomic<int> any{0};
};
inline std::unique_ptr<Block> block;

inline void __syncthreads() { block->everyone.arrive_and_wait(); }

inline int __syncthreads_or(int x) {  // once in a kernel
    block->any |= x != 0;
    __syncthreads();
    return block->any;
}

inline double __shfl_down_sync(unsigned, double x, int distance) {
    std::barrier<>& warp = *block->warps[threadIdx.x / 32];
    block->lanes[threadIdx.x] = x;
    warp.arrive_and_wait();
    const double other = threadIdx.x % 32 + distance < 32 ? block->lanes[threadIdx.x + distance] : x;
    warp.arrive_and_wait();
    return other;
}

template <typename Kernel>
void run(unsigned grid, int threads, const Kernel& kernel) {
    // threads may have left the last one before its barriers
    const auto next = [threads]() noexcept { block = std::make_unique<Block>(threads); };
    std::barrier done(threads, next);
    gridDim.x = grid, next();
    std::vector<std::thread> team;
    for (int t = 0; t < threads; t++)
        team.emplace_back([&, t] {
            threadIdx.x = unsigned(t);
            for (unsigned b = 0; b < grid; b++) blockIdx.x = b, kernel(), done.arrive_and_wait();
        });
    for (std::thread& thread : team) thread.join();
}

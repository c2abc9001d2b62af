/* In place of CUDA's header: the files of csrc/cuda compile as C++ and their kernels run on the host, one block after
another. Every thread of a block is a fiber with a stack of its own that runs until it waits for others; they take turns
forwards and backwards, so that what one reads of another without a barrier between them is not yet there. Only
`kernel<<<grid, threads, …>>>(…)` is rewritten before, by test_cuda_on_host.py, to run(grid, threads, [&] { kernel(…);
}). What is not here the kernels do not use. */
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
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
inline Index threadIdx, blockIdx, gridDim;  // of the fiber that runs

enum cudaError_t { cudaSuccess };
using cudaStream_t = struct Stream*;
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct Fiber {
    static constexpr size_t STACK = 1 << 16;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done;
};

struct Barrier {
    int size, arrived = 0;
    long passed = 0;
};

struct Block {  // what its threads share
    std::vector<Barrier> warps;
    Barrier everyone;
    double lanes[1024];
    int any = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> work;  // of each thread
inline Block block;
inline bool moved;  // whether a fiber ended or passed a barrier

inline void wait_at(Barrier& barrier) {
    const long before = barrier.passed;
    if (++barrier.arrived == barrier.size) barrier.arrived = 0, barrier.passed++, moved = true;
    while (barrier.passed == before) swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

inline void __syncthreads() { wait_at(block.everyone); }

inline int __syncthreads_or(int x) {  // once in a kernel
    block.any |= x != 0;
    __syncthreads();
    return block.any;
}

inline double __shfl_down_sync(unsigned, double x, int distance) {
    Barrier& warp = block.warps[threadIdx.x / 32];
    block.lanes[threadIdx.x] = x;
    wait_at(warp);
    const double other = threadIdx.x % 32 + distance < 32 ? block.lanes[threadIdx.x + distance] : x;
    wait_at(warp);
    return other;
}

inline void run_fiber() {
    work();
    fibers[threadIdx.x].done = moved = true;
}

inline void run_block(int threads) {
    block = {std::vector<Barrier>(threads / 32, {32}), {threads}, {}};
    for (int t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = Fiber::STACK;
        fiber.context.uc_link = &scheduler;
        fiber.done = false;
        makecontext(&fiber.context, run_fiber, 0);
    }
    moved = true;
    for (bool forwards = true; moved; forwards = !forwards) {
        moved = false;
        for (int i = 0; i < threads; i++) {
            const int t = forwards ? i : threads - 1 - i;
            threadIdx.x = unsigned(t);
            if (!fibers[t].done) swapcontext(&scheduler, &fibers[t].context);
        }
    }
    for (int t = 0; t < threads; t++)
        if (!fibers[t].done) std::fprintf(stderr, "thread %d waits for one that never comes\n", t), std::abort();
}

template <typename Kernel>
void run(unsigned grid, int threads, const Kernel& kernel) {
    if (int(fibers.size()) < threads) fibers.resize(threads);
    work = kernel;
    gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) run_block(threads);
}

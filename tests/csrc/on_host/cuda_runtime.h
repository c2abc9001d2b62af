/* In place of CUDA's header: the files of csrc/cuda compile as C++ and their kernels run on the host, one block after
another. Every thread of a block is a fiber with a stack of its own that runs until it waits for others; they take turns
forwards and backwards, so that what one reads of another without a barrier between them is not yet there. Only
`kernel<<<grid, threads, shared, …>>>(…)` is rewritten before, by support/on_host.py, to run(grid, threads, shared, [&]
{ kernel(…); }). What is not here the kernels do not use; instructions that they write in assembly are in attention/,
and shared_memory.h says what they do wrong with shared memory. */
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
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
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
    return cudaSuccess;
}
using std::max;
using std::min;

struct Fiber {
    static constexpr size_t STACK = 1 << 16;
    ucontext_t start;
    jmp_buf here;  // where it waits
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool started, done;
};

struct Barrier {
    int size, arrived = 0;
    long passed = 0;
};

struct Warp {
    Barrier barrier{32};
    const char* doing = nullptr;  // the instruction that its lanes come together for
    void* parts[32];
};

struct Block {  // what its threads share
    std::vector<Warp> warps;
    Barrier everyone;
    int any = 0;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::function<void()> work;  // of each thread
inline Block block;
inline bool moved;         // whether a fiber ended or passed a barrier
inline std::string fault;  // what a kernel did wrong

// Let others run. No system call, unlike swapcontext.
__attribute__((noinline)) inline void pause() {
    if (!_setjmp(fibers[threadIdx.x].here)) _longjmp(scheduler, 1);
}

// The kernel ends here, and its launch with an exception.
[[noreturn]] inline void fail(const std::string& what) {
    fault = what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")";
    for (;;) pause();
}

inline void wait_at(Barrier& barrier) {
    const long before = barrier.passed;
    if (++barrier.arrived == barrier.size) barrier.arrived = 0, barrier.passed++, moved = true;
    while (barrier.passed == before) pause();
}

// An instruction of a whole warp: execute(parts) once, when every lane has come with its part.
template <typename Part, typename Execute>
void together(const char* doing, Part& part, const Execute& execute) {
    Warp& warp = block.warps[threadIdx.x / 32];
    if (warp.barrier.arrived == 0) warp.doing = doing;
    if (warp.doing != doing) fail(std::string("lanes of a warp come together for ") + warp.doing + " and for " + doing);
    warp.parts[threadIdx.x % 32] = &part;
    if (warp.barrier.arrived == 31) execute(reinterpret_cast<Part* const*>(warp.parts));
    wait_at(warp.barrier);
}

inline void __syncthreads() { wait_at(block.everyone); }

inline int __syncthreads_or(int x) {  // once in a kernel
    block.any |= x != 0;
    __syncthreads();
    return block.any;
}

template <typename T>
struct Exchange {
    T mine, other;
};

// What each lane has of lane from(its number), or its own where there is no such lane.
template <typename T, typename From>
T shuffle(const char* doing, T x, const From& from) {
    Exchange<T> part = {x, x};
    together(doing, part, [&](Exchange<T>* const* parts) {
        for (int lane = 0; lane < 32; lane++)
            if (from(lane) < 32) parts[lane]->other = parts[from(lane)]->mine;
    });
    return part.other;
}
inline double __shfl_down_sync(unsigned, double x, int distance) {
    return shuffle("shfl.down", x, [distance](int lane) { return lane + distance; });
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    return shuffle("shfl.bfly", x, [mask](int lane) { return lane ^ mask; });
}
inline unsigned __ballot_sync(unsigned, bool x) {
    Exchange<unsigned> part = {x, 0};
    together("vote.ballot", part, [](Exchange<unsigned>* const* parts) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; lane++) votes |= parts[lane]->mine << lane;
        for (int lane = 0; lane < 32; lane++) parts[lane]->other = votes;
    });
    return part.other;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline int __ffs(int x) { return __builtin_ffs(x); }
struct Range {
    uintptr_t begin, end;
};
inline std::vector<Range> readable;  // what a launch was given, if a test says so
extern "C" __attribute__((visibility("default"), weak)) void let_read(uintptr_t begin, uintptr_t end) {
    readable.push_back({begin, end});
}
extern "C" __attribute__((visibility("default"), weak)) void let_read_anything() { readable.clear(); }

inline void check_read(const void* from, size_t bytes) {
    const auto p = reinterpret_cast<uintptr_t>(from);
    for (const Range& range : readable)
        if (range.begin <= p && p + bytes <= range.end) return;
    if (!readable.empty()) fail("global memory is read that the launch was not given");
}

template <typename T>
T __ldg(const T* p) {
    check_read(p, sizeof(T));
    return *p;
}

inline std::function<void()> begin_block = [] {}, end_block = [] {};  // of what keeps an eye on shared memory
inline int shared_bytes;  // that the launch asked for

inline void run_fiber() {
    work();
    fibers[threadIdx.x].done = moved = true;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

inline void run_block(int threads) {
    block = {std::vector<Warp>(threads / 32), {threads}};
    for (int t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = Fiber::STACK;
        fiber.started = fiber.done = false;
        makecontext(&fiber.start, run_fiber, 0);
    }
    fault.clear();
    begin_block();
    moved = true;
    for (bool forwards = true; moved && fault.empty(); forwards = !forwards) {
        moved = false;
        for (int i = 0; i < threads && fault.empty(); i++) {
            const int t = forwards ? i : threads - 1 - i;
            threadIdx.x = unsigned(t);
            if (!fibers[t].done) resume(fibers[t]);
        }
    }
    for (int t = 0; t < threads && fault.empty(); t++)
        if (!fibers[t].done) fault = "thread " + std::to_string(t) + " waits for one that never comes";
    if (fault.empty()) end_block();
    if (!fault.empty()) throw std::runtime_error(fault);
}

extern "C" __attribute__((visibility("default"), weak)) long last_block_first = 0;

template <typename Kernel>
void run(unsigned grid, int threads, int bytes, const Kernel& kernel) {
    if (int(fibers.size()) < threads) fibers.resize(threads);
    work = kernel;
    shared_bytes = bytes;
    gridDim.x = grid;
    for (unsigned i = 0; i < grid; i++) {
        blockIdx.x = last_block_first ? grid - 1 - i : i;
        run_block(threads);
    }
}

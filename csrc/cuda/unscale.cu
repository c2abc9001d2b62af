/*
Reading gradients before a step: their norm, and unscaling in place with a check for overflow.

The norm is deterministic: every chunk is summed by one block in a fixed order, its sum is stored, and one block adds
the sums in order. Sums are fp64 because squares of fp32 numbers overflow fp32; but a consumer card has 1/64 of its
speed in fp64, less than reading bf16 at full bandwidth asks for. So the squares of one vector are added in fp32 and
that sum joins the rest in fp64, a quarter of the conversions; only where it leaves fp32's safe range is the vector
squared again in fp64. The relative error of four additions, 2⁻²², averages out over the vectors and is halved by the
root.
*/
#include "launch.h"
#include "multi_tensor.cuh"
#include "squares.h"

namespace fastlm {

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

struct SumOfSquares {
    double* sums;  // one for each chunk

    __device__ void operator()(const Chunk<1>& chunk) const {
        double sum = 0.0;
        map<0, 4>(chunk, threadIdx.x, [&](float (&x)[1][VECTOR], int) { sum += sum_of_squares(x[0]); });
        sum = block_sum<THREADS>(sum);
        if (threadIdx.x == 0) sums[chunk.index] = sum;
    }
};

constexpr int FINISH_THREADS = 1024;

__global__ void __launch_bounds__(FINISH_THREADS)
    finish(const double* sums, int64_t n, const float* scale, double max_norm, float* stats) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += FINISH_THREADS) sum += sums[i];
    sum = block_sum<FINISH_THREADS>(sum);
    if (threadIdx.x == 0) write_stats(sum, scale ? *scale : 1.0f, max_norm, stats);
}

struct Unscale {
    const float* factor;
    float* found_inf;

    __device__ void operator()(const Chunk<1>& chunk) const {
        const float f = *factor;
        bool bad = false;
        map<0b1, 4>(chunk, threadIdx.x, [&](float (&x)[1][VECTOR], int) {
#pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                bad |= (as_bits(x[0][e]) & 0x7f800000u) == 0x7f800000u;  // an exponent of all ones is inf or NaN
                x[0][e] *= f;
            }
        });
        if (__syncthreads_or(bad) && threadIdx.x == 0) *found_inf = 1.0f;  // whoever comes writes the same
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

int64_t grad_stats_workspace(const Sizes& sizes) { return chunks_of(sizes) * int64_t(sizeof(double)); }

void launch_grad_stats(const Tensors& g, const Sizes& sizes, Address scale, double max_norm, Address stats,
    Address workspace, int device, Address stream) {
    check_list("grads", g, sizes);
    check(stats != 0, "stats is null");
    const int64_t chunks = chunks_of(sizes);
    check(workspace != 0 || chunks == 0, "workspace is null");
    const OnDevice on(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    const auto sums = reinterpret_cast<double*>(workspace);
    launch("grad_stats", {&g}, sizes, SumOfSquares{sums}, queue);
    finish<<<1, FINISH_THREADS, 0, queue>>>(
        sums, chunks, reinterpret_cast<const float*>(scale), max_norm, reinterpret_cast<float*>(stats));
    check(cudaGetLastError(), "launch grad_stats");
}

void launch_unscale(
    const Tensors& g, const Sizes& sizes, Address factor, Address found_inf, int device, Address stream) {
    check_list("grads", g, sizes);
    check(factor && found_inf, "factor and found_inf must be given");
    const OnDevice on(device);
    const Unscale rule{reinterpret_cast<const float*>(factor), reinterpret_cast<float*>(found_inf)};
    launch("unscale", {&g}, sizes, rule, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace fastlm

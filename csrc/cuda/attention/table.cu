/*
The gradient of the table: the sum of dS over all pairs of a distance.

Tiles on one block diagonal hold the same distances at the same places. So a block that owns a block diagonal of a head
adds dS tile upon tile in registers and sums along the diagonals once, at the end. Blocks write partial sums, 2 · BLOCK
distances each, half of which the next block diagonal shares; a second kernel adds them in a fixed order. No atomics:
the bits repeat.
*/
#include "kernels.h"
#include "probabilities.cuh"

namespace fastlm {

constexpr int PITCH = BLOCK + 8;  // of sums in shared memory: pairs of columns of four rows lie in 32 different banks

template <int D>
struct TableShape {
    static constexpr int WARPS = BLOCK / 16, THREADS = WARPS * WARP_LANES;
    static constexpr int TILES = 4 * BLOCK * Tile<D>::ROW_BYTES, SUMS = BLOCK * PITCH * int(sizeof(float));
    static constexpr int BYTES = TILES > SUMS ? TILES : SUMS;
};

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

// The i-th of 0 … n - 1 by nearness to the middle: to and fro, then what is left of the longer side.
static __device__ int from_the_middle(int i, int middle, int n) {
    middle = max(min(middle, n - 1), 0);
    const int shorter = min(middle, n - 1 - middle);
    if (i > 2 * shorter) return middle > shorter ? n - 1 - i : i;
    return middle + (i % 2 == 0 ? -(i / 2) : i / 2 + 1);
}

template <typename T, int D>
__global__ void __launch_bounds__(TableShape<D>::THREADS) attention_table(const __grid_constant__ AttentionBackward x) {
    constexpr int THREADS = TableShape<D>::THREADS;
    const Attention& a = x.forward;
    // which block diagonal of which head, and which share of its tiles; the longest begin
    const int split = int(blockIdx.x) % x.splits, h = int(blockIdx.x) / x.splits % a.H, row = 16 * warp();
    const int i_diagonal = from_the_middle(int(blockIdx.x) / x.splits / a.H, -x.first_diagonal, x.diagonals);
    const int diagonal = x.first_diagonal + i_diagonal, first_row = max(-diagonal, 0);
    const int rows = min(pieces(a.Lq, BLOCK), pieces(a.Lk, BLOCK) - diagonal) - first_row;
    const Tile<D> q{shared_memory()}, k = q.after(BLOCK), grad = k.after(BLOCK), v = grad.after(BLOCK);

    FragmentC sums[1][BLOCK / 8] = {};
    for (int step = split; step < a.B * rows; step += x.splits) {
        const int i_tile = first_row + step % rows, j_tile = i_tile + diagonal, i0 = i_tile * BLOCK,
                  j0 = j_tile * BLOCK;
        const Head head(a, step / rows, h);
        const auto walk = tiles_of_keys<BLOCK, BLOCK>(a, head, i0);
        if (j_tile < walk.begin || j_tile >= walk.end || walk.next(j_tile) != j_tile) continue;
        __syncthreads();  // everyone is done with the last tile
        copy_rows<BLOCK, THREADS>(q, Matrix(a.q, head.b, h), i0, a.Lq, a.D);
        copy_rows<BLOCK, THREADS>(k, Matrix(a.k, head.b, h / a.group), j0, head.keys, a.D);
        copy_rows<BLOCK, THREADS>(grad, Matrix(x.grad, head.b, h), i0, a.Lq, a.D);
        copy_rows<BLOCK, THREADS>(v, Matrix(a.v, head.b, h / a.group), j0, head.keys, a.D);
        commit_copies();
        Statistics of[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t i = padded_row(a, int64_t(head.b) * a.H + h) + i0 + row + row_of(0, 2 * half);
            of[half] = {x.lse[i], x.delta[i]};
        }
        const bool full = walk.full(j_tile);
        FragmentC s[1][BLOCK / 8], dp[1][BLOCK / 8] = {};
        start<false>(s, a, h, i0 + row, j0, full && i0 + BLOCK <= a.Lq);
        wait_for_copies<0>();
        __syncthreads();
        // P and dP - δ once more, as for dQ; dS stays by pair until the end
        multiply_rows<T>(s, [&](int, int c) { return load_a(q, row, c); }, k);
        if (!full) hide<false>(s, a, head, i0 + row, j0);
        multiply_rows<T>(dp, [&](int, int c) { return load_a(grad, row, c); }, v);
        probabilities(s, dp, a.scale * LOG2E, of);
#pragma unroll
        for (int n = 0; n < BLOCK / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[0][n].x[e] += dp[0][n].x[e];
    }

    // the diagonals, a thread for each: column - row = threadIdx.x - BLOCK
    __syncthreads();
#pragma unroll
    for (int n = 0; n < BLOCK / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            store_two(q.at + ((row + row_of(0, 2 * half)) * PITCH + column_of(n, 0)) * 4, sums[0][n].x[2 * half],
                sums[0][n].x[2 * half + 1]);
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < BLOCK; i++) {
        const int j = i + int(threadIdx.x) - BLOCK;
        const float dS = load_shared(q.at + (i * PITCH + min(max(j, 0), BLOCK - 1)) * 4);
        sum += j >= 0 && j < BLOCK ? dS : 0.0f;
    }
    x.partial[((int64_t(h) * x.splits + split) * x.diagonals + i_diagonal) * 2 * BLOCK + threadIdx.x] = sum;
}

constexpr int SUM_THREADS = 128;

// A distance of a head to each thread: the non-negative half of one block diagonal and the negative half of the next.
__global__ void __launch_bounds__(SUM_THREADS) attention_table_sum(const __grid_constant__ AttentionBackward x) {
    const Attention& a = x.forward;
    const int distances = a.Lq + a.Lk - 1, rows = pieces(a.Lq, BLOCK);
    const int64_t place = int64_t(blockIdx.x) * SUM_THREADS + threadIdx.x, h = place / distances;
    if (h >= a.H) return;
    const int from_first =
        int(place % distances) - (a.Lq - 1) + rows * BLOCK;  // from a multiple of BLOCK, not negative
    const int here = from_first / BLOCK - rows - x.first_diagonal, within = from_first % BLOCK;
    float sum = 0.0f;
    for (int split = 0; split < x.splits; split++) {
        const float* partial = x.partial + (h * x.splits + split) * x.diagonals * 2 * BLOCK;
        if (here >= 0 && here < x.diagonals) sum += partial[here * 2 * BLOCK + BLOCK + within];
        if (here + 1 >= 0 && here + 1 < x.diagonals) sum += partial[(here + 1) * 2 * BLOCK + within];
    }
    x.dtable[place] = sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

template <typename T, int D>
static void launch_table(const AttentionBackward& x, cudaStream_t stream) {
    constexpr int THREADS = TableShape<D>::THREADS, BYTES = TableShape<D>::BYTES;
    const unsigned blocks = grid(int64_t(x.forward.H) * x.diagonals * x.splits);
    const auto kernel = attention_table<T, D>;
    allow_shared(kernel, BYTES);
    if (blocks > 0) kernel<<<blocks, THREADS, BYTES, stream>>>(x);
    check(cudaGetLastError(), "launch attention_table");
}

void table(const AttentionBackward& x, int dtype, cudaStream_t stream) {
    const Attention& a = x.forward;
    for_numbers_and_channels(dtype, a.D,
        [&](auto number, auto channels) { launch_table<decltype(number), decltype(channels)::value>(x, stream); });
    const unsigned blocks = grid((int64_t(a.H) * (a.Lq + a.Lk - 1) + SUM_THREADS - 1) / SUM_THREADS);
    attention_table_sum<<<blocks, SUM_THREADS, 0, stream>>>(x);
    check(cudaGetLastError(), "launch attention_table_sum");
}

}  // namespace fastlm

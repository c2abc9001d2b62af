/* Tiles of rows in shared memory, and the two products that attention is made of.

A tile is [rows, D] of 16-bit numbers, a row after the other, in chunks of eight numbers (16 bytes). Loads of matrices
take one chunk of each of eight rows at a time; those would lie in the same four of the 32 banks, so chunk c of row r
lies where chunk c XOR (r mod 8) would, and the eight cover all banks once. Copies, which take eight chunks of a row at
a time, do so anyway. */
#pragma once

#include "attention.h"
#include "copy.cuh"
#include "mma.cuh"

namespace fastlm {

template <int D>
struct Tile {
    Shared at;

    static constexpr int CHUNKS = D / 8, ROW_BYTES = D * 2;

    __device__ __forceinline__ Shared chunk(int row, int c) const {
        return at + row * ROW_BYTES + ((c ^ (row & 7)) << 4);
    }

    // The tile that begins after so many rows of this one.
    __device__ __forceinline__ Tile after(int rows) const { return {at + rows * ROW_BYTES}; }
};

static __device__ __forceinline__ int lane() { return int(threadIdx.x) % WARP_LANES; }
static __device__ __forceinline__ int warp() { return int(threadIdx.x) / WARP_LANES; }

// One head of a tensor.
struct Matrix {
    const char* data;
    int64_t row;

    __device__ Matrix(const Rows& x, int b, int h) : data(x.data + (b * x.batch + h * x.head) * 2), row(x.row) {}
};

// Begin to copy rows first … first + ROWS - 1, of which n exist in all, of `channels` channels. What is not there is 0.
template <int ROWS, int THREADS, int D>
static __device__ __forceinline__ void copy_rows(
    const Tile<D>& tile, const Matrix& from, int first, int n, int channels) {
    constexpr int STEP = THREADS / Tile<D>::CHUNKS;
    static_assert(THREADS % Tile<D>::CHUNKS == 0 && ROWS % STEP == 0, "threads copy whole rows");
    const int row = int(threadIdx.x) / Tile<D>::CHUNKS, c = int(threadIdx.x) % Tile<D>::CHUNKS;
    const char* p = from.data + ((first + row) * from.row + c * 8) * 2;
    const int left = c * 8 < channels ? n - first - row : 0;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++)
        copy_async(tile.chunk(row + i * STEP, c), p + i * STEP * from.row * 2, i * STEP < left);
}

// 16 rows of a tile from `row` on, channels 16k … 16k + 15.
template <int D>
static __device__ __forceinline__ FragmentA load_a(const Tile<D>& tile, int row, int k) {
    return load_matrices(tile.chunk(row + lane() % 16, 2 * k + lane() / 16));
}

// c [16 M, 8 N] += a bᵀ, of all 8 N rows of tile b. a(m, k): channels 16k … 16k + 15 of rows 16m … 16m + 15.
template <typename T, int M, int N, int D, typename Left>
static __device__ __forceinline__ void multiply_rows(FragmentC (&c)[M][N], const Left& a, const Tile<D>& b) {
    const int row = lane() % 8 + lane() / 16 * 8, half = lane() / 8 % 2;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        FragmentA x[M];
#pragma unroll
        for (int m = 0; m < M; m++) x[m] = a(m, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            const FragmentA y = load_matrices(b.chunk(8 * n + row, 2 * k + half));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(c[m][n], x[m], {y.x[0], y.x[1]});
                mma<T>(c[m][n + 1], x[m], {y.x[2], y.x[3]});
            }
        }
    }
}

// c [16 M, D] += p b, of p [16 M, 16 K] and the 16 K rows of tile b.
template <typename T, int M, int K, int D>
static __device__ __forceinline__ void multiply_columns(
    FragmentC (&c)[M][D / 8], const FragmentA (&p)[M][K], const Tile<D>& b) {
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            const FragmentA y = load_matrices_transposed(b.chunk(16 * k + lane() % 16, n + lane() / 16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(c[m][n], p[m][k], {y.x[0], y.x[1]});
                mma<T>(c[m][n + 1], p[m][k], {y.x[2], y.x[3]});
            }
        }
    }
}

}  // namespace fastlm

/* Scores of a tile of pairs, 16 M rows × 8 N columns to a warp: rows are queries and columns keys, or (KEYS_FIRST) the
other way round. Where a lane's numbers lie: fragments.cuh.

Scores are kept in multiples of 1/scale, so that a table can be the product's first accumulator and the softmax is one
multiply-add and one exp2. */
#pragma once

#include "arithmetic.cuh"
#include "masks.cuh"

namespace fastlm {

constexpr float INFINITE = __builtin_huge_valf();

// x, which the compiler takes for another number each time: what is made of it is made where it is needed, and keeps no
// register for the whole loop.
static __device__ __forceinline__ int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The row and the column of a lane's number e of fragment (m, n).
static __device__ __forceinline__ int row_of(int m, int e) { return 16 * m + lane() / 4 + e / 2 * 8; }
static __device__ __forceinline__ int column_of(int n, int e) { return 8 * n + lane() % 4 * 2 + e % 2; }

// What is added to the product: the table's scores, or zeros. row0, column0: of the warp's first pair. inside: all
// pairs exist; else those that do not get the score of one that does.
template <bool KEYS_FIRST, int M, int N>
static __device__ __forceinline__ void start(
    FragmentC (&s)[M][N], const Attention& a, int h, int row0, int column0, bool inside) {
    if (!a.table) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++) s[m][n] = {};
        return;
    }
    // fragments of one n - 2m hold the same distances, as do the upper half of one and the lower half of the next
    constexpr int FIRST = 2 * M - 1, STRIPS = N + FIRST, STEP = KEYS_FIRST ? -1 : 1;
    row0 = anew(row0);
    const int distances = a.Lq + a.Lk - 1, origin = STEP * (column0 + column_of(0, 0) - row0 - row_of(0, 0)) + a.Lq - 1;
    const float* table = a.table + int64_t(h) * distances;
    float strip[STRIPS][2];
    if (inside) {
        table += origin;
#pragma unroll
        for (int u = 0; u < STRIPS; u++)
#pragma unroll
            for (int e = 0; e < 2; e++) strip[u][e] = __ldg(table + STEP * (8 * (u - FIRST) + e));
    } else {
#pragma unroll
        for (int u = 0; u < STRIPS; u++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                strip[u][e] = __ldg(table + min(max(origin + STEP * (8 * (u - FIRST) + e), 0), distances - 1));
    }
    const float unit = 1.0f / a.scale;
#pragma unroll
    for (int u = 0; u < STRIPS; u++)
#pragma unroll
        for (int e = 0; e < 2; e++) strip[u][e] *= unit;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][n].x[e] = strip[n - 2 * m - e / 2 + FIRST][e % 2];
}

// Whether query i sees key j.
static __device__ __forceinline__ bool visible(const Attention& a, const Head& head, int i, int j) {
    const int distance = j - i - a.offset;
    bool seen = ((distance >= -a.left && distance <= a.right) || j < head.prefix) && j < head.keys;
    if (a.q_segments)
        seen = seen && __ldg(a.q_segments + int64_t(head.b) * a.Lq + min(i, a.Lq - 1)) ==
                           __ldg(a.k_segments + int64_t(head.b) * a.Lk + min(j, a.Lk - 1));
    return seen;
}

// -∞ to the pairs that are not visible. A bit for each pair of a row, found in a loop: 64 pairs side by side would take
// more registers than the products do.
template <bool KEYS_FIRST, int M, int N>
static __device__ __forceinline__ void hide(
    FragmentC (&s)[M][N], const Attention& a, const Head& head, int row0, int column0) {
    unsigned seen[M][2] = {};
#pragma unroll 1
    for (int c = 0; c < 2 * N; c++) {
        const int column = column0 + column_of(c / 2, c % 2);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = row0 + row_of(m, 2 * half);
                const bool bit = KEYS_FIRST ? visible(a, head, column, row) : visible(a, head, row, column);
                seen[m][half] |= unsigned(bit) << c;
            }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[m][n].x[e] = seen[m][e / 2] & 1u << (2 * n + e % 2) ? s[m][n].x[e] : -INFINITE;
}

// Numbers as the left side of a product with the columns' rows, in 16 bits.
template <typename T, int M, int N>
static __device__ __forceinline__ void narrow(const FragmentC (&s)[M][N], FragmentA (&p)[M][N / 2]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                p[m][n / 2].x[n % 2 * 2 + half] = pack<T>(s[m][n].x[2 * half], s[m][n].x[2 * half + 1]);
}

// factor · x, 16 M rows from `row` on, to [rows, channels] without gaps, n rows and `channels` channels of which exist.
template <typename T, int M, int N>
static __device__ __forceinline__ void store_rows(
    const FragmentC (&x)[M][N], const float (&factor)[M][2], char* to, int row, int n, int channels) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = row + row_of(m, 2 * half);
            if (i >= n) continue;
            uint32_t* p = reinterpret_cast<uint32_t*>(to + (int64_t(i) * channels + column_of(0, 0)) * 2);
#pragma unroll
            for (int c = 0; c < N; c++)
                if (8 * c < channels)
                    p[4 * c] =
                        pack<T>(factor[m][half] * x[m][c].x[2 * half], factor[m][half] * x[m][c].x[2 * half + 1]);
        }
}

}  // namespace fastlm

/*
The one matrix product that attention is made of: C [M, N] = A [M, K] · B [K, N] on operands in the first caches.

B's rows are vectors, A's elements are broadcast; a block of ROWS × COLUMNS vectors of C stays in registers over the
whole of K. `end(row, column, c)` takes each vector of it from there, so that scaling, bias, mask, exponential and the
addition to what other tiles gave act on registers. Columns are counted in vectors. Sums run over K in order, whatever
the blocks, and in parts of DEPTH, whose sums have half the rounding error of 64 products added one by one.
*/
#pragma once

#include "../vector.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int ROWS = 4;
constexpr int COLUMNS = W == 16 ? 4 : 2;  // 16 or 8 sums, enough to hide the latency of two multiply-adds a cycle
constexpr int DEPTH = 16;

struct Left {  // element (m, k) of A
    const float* data;
    int64_t row, step;
    FASTLM_INLINE const float* at(int64_t m, int64_t k) const { return data + m * row + k * step; }
};

struct Right {  // row k of B
    const float* data;
    int64_t step;
    FASTLM_INLINE const float* at(int64_t k) const { return data + k * step; }
};

}  // namespace FASTLM_ISA
}  // namespace fastlm

#if defined(FASTLM_AMX)
#include "amx.h"
#endif

namespace fastlm {
namespace FASTLM_ISA {

template <class Product, int M, int N>
static FASTLM_INLINE void accumulate(
    const Left& a, const Right& b, int row, int column, int k, int steps, V (&c)[M][N]) {
    const float *pa = a.at(row, k), *pb = b.at(k) + column * W;
    for (; steps > 0; steps--, pa += a.step, pb += b.step) {
        V y[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) y[n] = load(pb + n * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const V x = broadcast(pa[m * a.row]);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) c[m][n] = Product::multiply_add(x, y[n], c[m][n]);
        }
    }
}

template <class Product, int M, int N, class End>
static FASTLM_INLINE void block(const Left& a, const Right& b, int row, int column, int K, const End& end) {
    V c[M][N] = {};
    accumulate<Product>(a, b, row, column, 0, K < DEPTH ? K : DEPTH, c);
    for (int k = DEPTH; k < K; k += DEPTH) {
        V part[M][N] = {};
        accumulate<Product>(a, b, row, column, k, K - k < DEPTH ? K - k : DEPTH, part);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) c[m][n] += part[m][n];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) end(row + m, column + n, c[m][n]);
}

// Σ a[k] · b[k] over the K words of each lane's columns, in the order and to the bit in which `block` adds the same.
template <class Product>
static FASTLM_INLINE V column_product(const float* a, const float* b, int64_t pitch, int K) {
    V c = {};
    for (int k = 0; k < K; k += DEPTH) {
        V part = {};
        for (int e = k; e < K && e < k + DEPTH; e++)
            part = Product::multiply_add(load(a + e * pitch), load(b + e * pitch), part);
        c = k ? c + part : part;
    }
    return c;
}

template <class Product, int N, class End>
static FASTLM_INLINE void columns(const Left& a, const Right& b, int row, int column, int M, int K, const End& end) {
    for (; row + ROWS <= M; row += ROWS) block<Product, ROWS, N>(a, b, row, column, K, end);
    for (; row < M; row++) block<Product, 1, N>(a, b, row, column, K, end);
}

template <class Product, class End>
static FASTLM_INLINE void matmul(const Left& a, const Right& b, int M, int vectors, int K, const End& end) {
    int row = 0, column = 0;
#if defined(FASTLM_AMX)
    if (Product::TILES && a.step == 1) row = matmul_by_tiles<Product>(a, b, M, vectors, K, end);
#endif
    for (; column + COLUMNS <= vectors; column += COLUMNS) columns<Product, COLUMNS>(a, b, row, column, M, K, end);
    if (COLUMNS == 4 && vectors - column >= 2) {
        columns<Product, 2>(a, b, row, column, M, K, end);
        column += 2;
    }
    if (column < vectors) columns<Product, 1>(a, b, row, column, M, K, end);
}

// The product as it is, for what cannot be done in registers.
template <class Product>
static __attribute__((noinline)) void product(
    const Left& a, const Right& b, int M, int vectors, int K, float* out, int64_t pitch) {
    matmul<Product>(a, b, M, vectors, K, [&](int m, int c, V x) FASTLM_LAMBDA { store(out + m * pitch + c * W, x); });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm

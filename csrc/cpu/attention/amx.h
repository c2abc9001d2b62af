/* Products of bf16 pairs by AMX's tile registers (Intel's Software Developer's Manual, volume 2: LDTILECFG, TILELOADD,
TDPBF16PS).

A register holds 16 rows of 16 words. Where the words of A's rows lie side by side, its blocks are tiles as they lie in
memory, and B's always are: nothing is packed. Of the eight registers four are sums, two A's, two B's. A sum leaves
through memory, for vectors cannot read tiles; words beyond the last whole tile are added to it there, and rows beyond
are left to vectors. */
#pragma once

#include <immintrin.h>

namespace fastlm {
namespace FASTLM_ISA {

constexpr int SIDE = 16;  // rows of a tile, and words of a row

struct TileShapes {
    uint8_t palette, first_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

constexpr uint16_t ROW = 4 * SIDE;
alignas(64) static const TileShapes WHOLE = {
    1, 0, {}, {ROW, ROW, ROW, ROW, ROW, ROW, ROW, ROW}, {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};

// A thread's tile registers, from construction to destruction.
struct TileRegisters {
    FASTLM_INLINE TileRegisters() { _tile_loadconfig(&WHOLE); }
    FASTLM_INLINE ~TileRegisters() { _tile_release(); }
};

// M × N tiles of C from `row` and vector `column` on.
template <class Product, int M, int N, class End>
static FASTLM_INLINE void tiles(const Left& a, const Right& b, int row, int column, int K, const End& end) {
    const int whole = K / SIDE * SIDE;
    // GCC does not know that loading a tile reads memory: what is to be read must have been written
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    if (N == 2) _tile_zero(1);
    if (M == 2) _tile_zero(2);
    if (M == 2 && N == 2) _tile_zero(3);
    for (int k = 0; k < whole; k += SIDE) {
        _tile_loadd(4, a.at(row, k), 4 * a.row);
        _tile_loadd(6, b.at(k) + column * W, 4 * b.step);
        if (M == 2) _tile_loadd(5, a.at(row + SIDE, k), 4 * a.row);
        if (N == 2) _tile_loadd(7, b.at(k) + (column + 1) * W, 4 * b.step);
        _tile_dpbf16ps(0, 4, 6);
        if (N == 2) _tile_dpbf16ps(1, 4, 7);
        if (M == 2) _tile_dpbf16ps(2, 5, 6);
        if (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
    }
    alignas(64) float c[M * SIDE][N * W];
    _tile_stored(0, c[0], sizeof c[0]);
    if (N == 2) _tile_stored(1, c[0] + (N - 1) * W, sizeof c[0]);
    if (M == 2) _tile_stored(2, c[(M - 1) * SIDE], sizeof c[0]);
    if (M == 2 && N == 2) _tile_stored(3, c[(M - 1) * SIDE] + (N - 1) * W, sizeof c[0]);
    for (int m = 0; m < M * SIDE; m++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
            V x = load(c[m] + n * W);
            for (int k = whole; k < K; k++)
                x = Product::multiply_add(broadcast(*a.at(row + m, k)), load(b.at(k) + (column + n) * W), x);
            end(row + m, column + n, x);
        }
}

template <class Product, int N, class End>
static FASTLM_INLINE void tile_columns(const Left& a, const Right& b, int column, int M, int K, const End& end) {
    int row = 0;
    for (; row + 2 * SIDE <= M; row += 2 * SIDE) tiles<Product, 2, N>(a, b, row, column, K, end);
    if (row + SIDE <= M) tiles<Product, 1, N>(a, b, row, column, K, end);
}

// All rows of C that fill tiles; returns how many these are.
template <class Product, class End>
static FASTLM_INLINE int matmul_by_tiles(const Left& a, const Right& b, int M, int vectors, int K, const End& end) {
    if (K < SIDE) return 0;
    int column = 0;
    for (; column + 2 <= vectors; column += 2) tile_columns<Product, 2>(a, b, column, M, K, end);
    if (column < vectors) tile_columns<Product, 1>(a, b, column, M, K, end);
    return M / SIDE * SIDE;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm

// In place of csrc/cuda/attention/mma.cuh: the lanes' parts of a matrix as the figures of the PTX ISA show them.
#pragma once

#include "../../rules/numeric.h"
#include "fragments.cuh"
#include "shared.cuh"

namespace fastlm {

template <typename T>
float number(uint32_t two, int which) {
    return widen(T{uint16_t(two >> 16 * which)});
}

struct Product {
    FragmentC* c;
    const FragmentA* a;
    const FragmentB* b;
};

// "Matrix Fragments for mma.m16n8k16 with floating point type": groupID is lane / 4, threadID_in_group lane % 4.
template <typename T>
void multiply(Product* const* parts) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const int group = lane / 4, within = lane % 4;
        for (int i = 0; i < 8; i++) {  // a0 … a7: rows by i = 0, 1, 4, 5 and 2, 3, 6, 7, columns by i < 4 and i ≥ 4
            const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
            const int column = i < 4 ? within * 2 + (i & 1) : within * 2 + (i & 1) + 8;
            a[row][column] = number<T>(parts[lane]->a->x[i / 2], i & 1);
        }
        for (int i = 0; i < 4; i++) {  // b0 … b3
            const int row = i < 2 ? within * 2 + (i & 1) : within * 2 + (i & 1) + 8;
            b[row][group] = number<T>(parts[lane]->b->x[i / 2], i & 1);
        }
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {  // c0 … c3
            const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
            float sum = parts[lane]->c->x[i];
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            parts[lane]->c->x[i] = sum;
        }
}

template <typename T>
void mma(FragmentC& c, const FragmentA& a, const FragmentB& b) {
    Product part = {&c, &a, &b};
    together("mma", part, multiply<T>);
}

struct Load {
    Shared row;
    FragmentA* to;
};

// "ldmatrix": thread 4r + c of the warp gets elements 2c and 2c + 1 of row r of each matrix.
template <bool TRANSPOSED>
void load(Load* const* parts) {
    uint32_t addresses[32];
    uint16_t rows[32][8];
    for (int lane = 0; lane < 32; lane++) {
        addresses[lane] = parts[lane]->row;
        watched::at(addresses[lane], 16);
        for (int w = 0; w < 4; w++) {
            const uint32_t two = watched::load(addresses[lane] + 4 * w, watched::MANY);
            rows[lane][2 * w] = uint16_t(two);
            rows[lane][2 * w + 1] = uint16_t(two >> 16);
        }
    }
    watched::count_conflicts(addresses, 16);
    for (int lane = 0; lane < 32; lane++)
        for (int matrix = 0; matrix < 4; matrix++) {
            const auto element = [&](int row, int column) { return uint32_t(rows[8 * matrix + row][column]); };
            const int row = lane / 4, column = lane % 4 * 2;
            parts[lane]->to->x[matrix] = TRANSPOSED ? element(column, row) | element(column + 1, row) << 16
                                                    : element(row, column) | element(row, column + 1) << 16;
        }
}

inline FragmentA load_matrices(Shared row) {
    FragmentA a;
    Load part = {row, &a};
    together("ldmatrix", part, load<false>);
    return a;
}
inline FragmentA load_matrices_transposed(Shared row) {
    FragmentA a;
    Load part = {row, &a};
    together("ldmatrix.trans", part, load<true>);
    return a;
}

}  // namespace fastlm

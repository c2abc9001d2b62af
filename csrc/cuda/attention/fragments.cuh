/* What a lane holds of the matrices of a product c [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = lane % 4:

    a    rows g, g + 8 of columns 2t, 2t + 1; then the same rows of columns 2t + 8, 2t + 9: a register each
    b    rows 2t, 2t + 1 of column g; then rows 2t + 8, 2t + 9: a register each
    c    columns 2t, 2t + 1 of row g; then of row g + 8: four registers

PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type". */
#pragma once

#include <cstdint>

namespace fastlm {

struct FragmentA {
    uint32_t x[4];
};
struct FragmentB {
    uint32_t x[2];
};
struct FragmentC {
    float x[4];
};

}  // namespace fastlm

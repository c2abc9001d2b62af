// Reading gradients before a step: their sum of squares, and unscaling in place with a check for overflow.
#include "isa.h"

namespace fastlm {
namespace FASTLM_ISA {

// Sixteen sums side by side, each in fp64: one AVX-512 register pair, the same order on every instruction set, and no
// overflow for any finite fp32.
constexpr int LANES = 16;

double sum_of_squares_chunk(Span g, int64_t n) {
    double sums[LANES] = {};
    float buffer[BLOCK];
    for (int64_t o = 0; o < n; o += BLOCK) {
        const int b = n - o < BLOCK ? int(n - o) : BLOCK;
        const float* x = load(at(g.data, g.dtype, o), g.dtype, buffer, b);
        int i = 0;
        for (; i + LANES <= b; i += LANES)
            for (int l = 0; l < LANES; l++) sums[l] += double(x[i + l]) * double(x[i + l]);
        for (; i < b; i++) sums[i % LANES] += double(x[i]) * double(x[i]);
    }
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) sums[l] += sums[l + half];
    return sums[0];
}

bool unscale_chunk(Span g, int64_t n, float factor) {
    float buffer[BLOCK];
    uint32_t bad = 0;
    for (int64_t o = 0; o < n; o += BLOCK) {
        const int b = n - o < BLOCK ? int(n - o) : BLOCK;
        void* data = at(g.data, g.dtype, o);
        float* x = load(data, g.dtype, buffer, b);
        for (int i = 0; i < b; i++) {
            bad |= (as_bits(x[i]) & 0x7f800000u) == 0x7f800000u;  // an exponent of all ones is inf or NaN
            x[i] *= factor;
        }
        store(x, data, g.dtype, b);
    }
    return bad;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
